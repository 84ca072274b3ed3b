"""Chat templates in the manner of the common families, over tokenizers trained here.

Each family also says in Python, without Jinja, what its template writes: the reference that the
tests of `armo.embed.boundary` compare with.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from armo.data.conversation import Message, Prompt

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "How do I boil an egg?\nPut it in hot water, for seven minutes.\n\nThen cool it.\n\n\n",
    "system\nuser\nassistant\nmodel\n\n- one\n- two\n**three** 1 2 3 4 5 6 7 8 9 0",
    '[one](two) [three](four) [five](six) <A/B/C/D/E/I/N/S/T> It\'s {x}; "y" | z = k ~ (j)',
    "é è 犬 猫 犬猫 🙂 🙃 🙂🙂",
]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
THINK = ("<think>", "</think>", "<think>\nHm.\n</think>\n\n")


@dataclass(frozen=True)
class Family:
    """A chat template, its tokenizer, and what the template writes.

    Attributes:
        name: Of the models that it is like.
        tokenizer: With the template.
        turns: What the template writes for a prompt, up to the end of the last turn.
        opening: What follows in the generation prompt, as far as all responses share its tokens.
        answer: What follows in a conversation.
        closing: The end of that, after the response's text.
        control: Its control text, for users to spell.
        folds: Whether system text has to go into the first user turn.
        tools: Whether it takes tool turns.
        open_ended: Whether a user's turn has no end, so that white space there is not its own.
        normal: Makes equal what the tokenizer does not tell apart.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    turns: Callable[[Prompt], str]
    opening: str
    answer: Callable[[str], str]
    closing: str
    control: tuple[str, ...]
    folds: bool = False
    tools: bool = False
    open_ended: bool = False
    normal: Callable[[str], str] = str

    def head(self, prompt: Prompt, position: str) -> str:
        """What the prompt's own tokens should say."""
        written = self.turns(folded(prompt) if self.folds else prompt)
        if position == "generation_prompt":
            return written + self.opening
        return written.rstrip() if self.open_ended else written

    def conversation(self, prompt: Prompt, response: str) -> str:
        """What the tokens of the whole conversation should say."""
        return self.turns(folded(prompt) if self.folds else prompt) + self.answer(response)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def folded(prompt: Prompt) -> Prompt:
    """Put a leading system turn into the user turn that follows it."""
    if prompt[0].role != "system":
        return prompt
    system, user = prompt[0].content, prompt[1].content
    return (Message("user", f"{system}\n\n{user}" if system.strip() else user), *prompt[2:])


def byte_level(
    template: str,
    *,
    eos: str,
    bos: str | None = None,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    nfc: bool = False,
) -> PreTrainedTokenizerFast:
    """Like Llama 3, Qwen and DeepSeek: words split by a pattern, then bytes.

    Args:
        template: The chat template.
        eos: End of sequence.
        bos: Beginning of sequence, if the family has one.
        special: Other control tokens.
        plain: Added tokens that are not special.
        nfc: Whether to compose letters and their accents, as Qwen does.
    """
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, into_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrapped(tokenizer, template, bos=bos, eos=eos, special=special, plain=plain)


def metaspace(
    template: str,
    *,
    eos: str,
    bos: str | None = None,
    special: Sequence[str] = (),
    rstrip: bool = False,
    legacy: bool = False,
) -> PreTrainedTokenizerFast:
    """Like Gemma, Mistral and Phi-3: whole texts, spaces as a letter, unknown letters as bytes.

    Args:
        template: The chat template.
        eos: End of sequence.
        bos: Beginning of sequence, if the family has one.
        special: Other control tokens.
        rstrip: Whether control tokens take the white space after them, as Phi-3's.
        legacy: Whether a space goes before the text after each control token.
    """
    space = normalizers.Replace(" ", "▁")
    trained = Tokenizer(models.BPE())
    trained.normalizer = space
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    known = [text for text in TEXTS if text.isascii()]
    trained.train_from_iterator(known, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: k for k, piece in enumerate(pieces)},
            [tuple(pair) for pair in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepended = normalizers.Sequence([normalizers.Prepend("▁"), space])
    tokenizer.normalizer = prepended if legacy else space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _wrapped(tokenizer, template, bos=bos, eos=eos, special=special, rstrip=rstrip)


def _wrapped(
    tokenizer: Tokenizer,
    template: str,
    *,
    bos: str | None,
    eos: str,
    special: Sequence[str],
    plain: Sequence[str] = (),
    rstrip: bool = False,
) -> PreTrainedTokenizerFast:
    names = [*special, eos, *([bos] if bos else [])]
    tokenizer.add_special_tokens([AddedToken(name, rstrip=rstrip) for name in names])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in plain])
    if bos:  # beside the template's, unless it is told not to
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos
    )
    # A template is laid out in lines here, which are not part of it.
    wrapped.chat_template = "".join(line.strip() for line in template.splitlines())
    return wrapped


def _thinking(text: str) -> tuple[str, str]:
    """Split a text in what stands in its think block and what follows it."""
    if "</think>" not in text:
        return "", text
    parts = text.split("</think>")
    return parts[0].split("<think>")[-1].strip("\n"), parts[-1].lstrip("\n")


def _llama3() -> Family:
    start, end, turn = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    template = r"""
        {{ bos_token }}
        {% for m in messages %}
        {{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim }}
        {{ '<|eot_id|>' }}
        {% endfor %}
        {% if add_generation_prompt %}
        {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {% endif %}
    """
    header = f"{start}assistant{end}\n\n"

    def turns(prompt: Prompt) -> str:
        written = [f"{start}{m.role}{end}\n\n{m.content.strip()}{turn}" for m in prompt]
        return "<|begin_of_text|>" + "".join(written)

    return Family(
        name="llama3",
        tokenizer=byte_level(template, bos="<|begin_of_text|>", eos=turn, special=[start, end]),
        turns=turns,
        opening=header,
        answer=lambda text: header + text.strip() + turn,
        closing=turn,
        control=(turn, turn + header, f"{turn}{start}user{end}\n\n"),
        tools=True,
    )


def _gemma2() -> Family:
    start, end = "<start_of_turn>", "<end_of_turn>"
    template = r"""
        {{ bos_token }}
        {% if messages[0].role == 'system' %}
        {{ raise_exception('there is no system role') }}
        {% endif %}
        {% for m in messages %}
        {% if (loop.index0 is even) != (m.role == 'user') %}
        {{ raise_exception('user and assistant must take turns') }}
        {% endif %}
        {% set name = 'model' if m.role == 'assistant' else m.role %}
        {{ '<start_of_turn>' ~ name ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
    """
    names = {"user": "user", "assistant": "model"}

    def turns(prompt: Prompt) -> str:
        written = [f"{start}{names[m.role]}\n{m.content.strip()}{end}" for m in prompt]
        return "<bos>" + "\n".join(written)

    return Family(
        name="gemma2",
        tokenizer=metaspace(template, bos="<bos>", eos="<eos>", special=[start, end]),
        turns=turns,
        opening=f"\n{start}model\n",
        answer=lambda text: f"\n{start}model\n{text.strip()}{end}\n",
        closing=f"{end}\n",
        control=(end, f"{end}\n{start}model\n", f"{end}\n{start}user\n"),
        folds=True,
    )


# One tool turn, in a block that begins with the first of a run and ends with the last.
_TOOL_BLOCK = r"""
    {% elif m.role == 'tool' %}
    {{ '<|im_start|>user' if loop.previtem.role != 'tool' }}
    {{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}
    {{ '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
"""
_CHATML = ("<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n")


def _chatml(prompt: Prompt) -> str:
    """Write turns as Qwen does, except for the line break after the last one."""
    blocks: list[str] = []
    for before, m in zip((None, *prompt), prompt, strict=False):
        if m.role != "tool":
            blocks.append(f"<|im_start|>{m.role}\n{m.content}<|im_end|>")
            continue
        inside = f"\n<tool_response>\n{m.content}\n</tool_response><|im_end|>"
        if before is not None and before.role == "tool":
            blocks[-1] = blocks[-1].removesuffix("<|im_end|>") + inside
        else:
            blocks.append(f"<|im_start|>user{inside}")
    return "\n".join(blocks)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _qwen25() -> Family:
    template = r"""
        {% if messages[0].role != 'system' %}
        {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}
        {% endif %}
        {% for m in messages %}
        {% if m.role != 'tool' %}
        {{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
        TOOL_BLOCK
        {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
    """.replace("TOOL_BLOCK", _TOOL_BLOCK)

    def turns(prompt: Prompt) -> str:
        default = () if prompt[0].role == "system" else (Message("system", "You help."),)
        return _chatml((*default, *prompt))

    return Family(
        name="qwen2.5",
        tokenizer=byte_level(template, eos="<|im_end|>", special=["<|im_start|>"], nfc=True),
        turns=turns,
        opening="\n<|im_start|>assistant\n",
        answer=lambda text: f"\n<|im_start|>assistant\n{text}<|im_end|>\n",
        closing="<|im_end|>\n",
        control=_CHATML,
        tools=True,
        normal=_nfc,
    )


def _qwen3(name: str = "qwen3", *, opened: str = "", shared: str = "") -> Family:
    """Think blocks before the last answer, an empty one too, but not before earlier answers.

    Args:
        name: Of the family.
        opened: What the generation prompt writes after the header.
        shared: The tokens of that which all responses follow.
    """
    template = r"""
        {% set ns = namespace(asked=-1) %}
        {% for m in messages %}
        {% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}
        {% endfor %}
        {% for m in messages %}
        {% if m.role == 'assistant' %}
        {{ '<|im_start|>assistant\n' }}
        {% set parts = m.content.split('</think>') %}
        {% set split = parts | length > 1 %}
        {% set thought = ((parts[0].split('<think>') | last).strip('\n')) if split else '' %}
        {% set rest = (parts | last).lstrip('\n') if split else m.content %}
        {% if loop.index0 > ns.asked and (loop.last or thought) %}
        {{ '<think>\n' ~ thought ~ '\n</think>\n\n' ~ rest.lstrip('\n') }}
        {% else %}
        {{ rest }}
        {% endif %}
        {{ '<|im_end|>\n' }}
        TOOL_BLOCK
        {% else %}
        {{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}
        {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\nOPENED' }}{% endif %}
    """
    template = template.replace("TOOL_BLOCK", _TOOL_BLOCK)
    template = template.replace("OPENED", opened.replace("\n", r"\n"))

    def block(thought: str, rest: str) -> str:
        return f"<think>\n{thought}\n</think>\n\n" + rest.lstrip("\n")

    def turns(prompt: Prompt) -> str:
        asked = max(k for k, m in enumerate(prompt) if m.role == "user")
        written = []
        for k, m in enumerate(prompt):
            thought, rest = _thinking(m.content)
            kept = block(thought, rest) if thought and k > asked else rest
            written.append(replace(m, content=kept) if m.role == "assistant" else m)
        return _chatml(tuple(written))

    return Family(
        name=name,
        tokenizer=byte_level(
            template,
            eos="<|im_end|>",
            special=["<|im_start|>"],
            plain=["<think>", "</think>", "<tool_response>", "</tool_response>"],
            nfc=True,
        ),
        turns=turns,
        opening=f"\n<|im_start|>assistant\n{shared}",
        answer=lambda text: f"\n<|im_start|>assistant\n{block(*_thinking(text))}<|im_end|>\n",
        closing="<|im_end|>\n",
        control=(*_CHATML, *THINK),
        tools=True,
        normal=_nfc,
    )


def _mistral_v02() -> Family:
    """Plain text around the user's turns, which merges with the text beside it."""
    template = r"""
        {{ bos_token }}
        {% for m in messages %}
        {% if (loop.index0 is even) != (m.role == 'user') %}
        {{ raise_exception('only user and assistant, and they must take turns') }}
        {% endif %}
        {% if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}
        {% else %}{{ m.content ~ eos_token }}{% endif %}
        {% endfor %}
    """

    def turns(prompt: Prompt) -> str:
        written = [
            f"[INST] {m.content} [/INST]" if m.role == "user" else f"{m.content}</s>"
            for m in prompt
        ]
        return "<s>" + "".join(written)

    return Family(
        name="mistral-v0.2",
        tokenizer=metaspace(template, bos="<s>", eos="</s>"),
        turns=turns,
        opening="",
        answer=lambda text: f"{text}</s>",
        closing="</s>",
        control=("[INST] ", " [/INST]", "</s>", "</s>[INST] "),
        folds=True,
    )


def _mistral_v03() -> Family:
    """System text before the last user turn, and only while that is the last turn of all."""
    template = r"""
        {% set system = messages[0].content ~ '\n\n' if messages[0].role == 'system' else '' %}
        {% set turns = messages[1:] if messages[0].role == 'system' else messages %}
        {{ bos_token }}
        {% for m in turns %}
        {% if m.role == 'tool' %}
        {% if not m.tool_call_id %}{{ raise_exception('a tool turn needs a call id') }}{% endif %}
        {{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}
        {% elif (loop.index0 is even) != (m.role == 'user') %}
        {{ raise_exception('user and assistant must take turns') }}
        {% elif m.role == 'user' %}
        {{ '[INST] ' ~ (system if loop.last else '') ~ m.content ~ '[/INST]' }}
        {% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}
        {% endfor %}
    """

    def turns(prompt: Prompt) -> str:
        written = [
            f"[INST] {m.content}[/INST]" if m.role == "user" else f" {m.content}</s>"
            for m in prompt
        ]
        return "<s>" + "".join(written)

    special = ["[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    return Family(
        name="mistral-v0.3",
        tokenizer=metaspace(template, bos="<s>", eos="</s>", special=special),
        turns=turns,
        opening="",
        answer=lambda text: f" {text}</s>",
        closing="</s>",
        control=("[INST] ", "[/INST]", "</s>", "</s>[INST] "),
        folds=True,
    )


def _deepseek_r1() -> Family:
    """No end to a user's turn; the think block is opened for the answer and then left out."""
    bos, eos, user, assistant, tool = (
        f"<\uff5c{name}\uff5c>"
        for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant", "tool▁output▁end")
    )
    template = r"""
        {{ bos_token }}
        {% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
        {% for m in messages %}
        {% if m.role == 'user' %}{{ USER ~ m.content }}
        {% elif m.role == 'tool' %}{{ m.content ~ TOOL }}
        {% elif m.role == 'assistant' %}
        {{ ASSISTANT ~ (m.content.split('</think>') | last) ~ eos_token }}
        {% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ ASSISTANT ~ '<think>\n' }}{% endif %}
    """
    for name, token in (("USER", user), ("ASSISTANT", assistant), ("TOOL", tool)):
        template = template.replace(name, f"'{token}'")

    def answer(text: str) -> str:
        return f"{assistant}{text.split('</think>')[-1]}{eos}"

    def turns(prompt: Prompt) -> str:
        write = {
            "system": str,
            "user": lambda text: user + text,
            "tool": lambda text: text + tool,
            "assistant": answer,
        }
        return bos + "".join(write[m.role](m.content) for m in prompt)

    return Family(
        name="deepseek-r1",
        tokenizer=byte_level(
            template, bos=bos, eos=eos, special=[user, assistant, tool], plain=THINK[:2]
        ),
        turns=turns,
        opening=assistant,
        answer=answer,
        closing=eos,
        control=(user, assistant, eos + user, *THINK),
        tools=True,
        open_ended=True,
    )


def _phi3() -> Family:
    """Control tokens that take the white space after them, and an end of text at the end."""
    template = r"""
        {% for m in messages if m.role in ('system', 'user', 'assistant') %}
        {{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}
        {% endfor %}
        {{ '<|assistant|>\n' if add_generation_prompt else eos_token }}
    """

    def turns(prompt: Prompt) -> str:
        return "\n".join(f"<|{m.role}|>\n{m.content}<|end|>" for m in prompt)

    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    return Family(
        name="phi3",
        tokenizer=metaspace(template, eos="<|endoftext|>", special=special, rstrip=True),
        turns=turns,
        opening="\n<|assistant|>\n",
        answer=lambda text: f"\n<|assistant|>\n{text}<|end|>\n<|endoftext|>",
        closing="<|end|>\n<|endoftext|>",
        control=("<|end|>", "<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>\n"),
        normal=lambda text: re.sub(r"(<\|\w+\|>)\s+", r"\1", text),
    )


def _glm() -> Family:
    """A think block that is opened for the answer, and closed at once before a plain one."""
    template = r"""
        {{ bos_token }}
        {% for m in messages %}
        {{ '<|' ~ m.role ~ '|>' }}
        {% if m.role != 'assistant' %}{{ m.content }}
        {% elif '</think>' in m.content %}{{ '<think>' ~ (m.content.split('<think>') | last) }}
        {% else %}{{ '</think>' ~ m.content }}{% endif %}
        {% endfor %}
        {% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}
    """

    def answer(text: str) -> str:
        if "</think>" in text:
            return "<|assistant|><think>" + text.split("<think>")[-1]
        return "<|assistant|></think>" + text

    def turns(prompt: Prompt) -> str:
        written = [
            answer(m.content) if m.role == "assistant" else f"<|{m.role}|>{m.content}"
            for m in prompt
        ]
        return "[gMASK]" + "".join(written)

    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    return Family(
        name="glm",
        tokenizer=byte_level(
            template, bos="[gMASK]", eos="<|endoftext|>", special=special, plain=THINK[:2]
        ),
        turns=turns,
        opening="<|assistant|>",
        answer=answer,
        closing="",
        control=("<|user|>", "<|assistant|>", *THINK),
        tools=True,
        open_ended=True,
    )


@cache
def families() -> tuple[Family, ...]:
    """All families, their tokenizers trained once."""
    no_thinking = "<think>\n\n</think>\n\n"
    return (
        _llama3(),
        _gemma2(),
        _qwen25(),
        _qwen3(),
        _qwen3("qwen3-no-thinking", opened=no_thinking, shared="<think>"),
        _mistral_v02(),
        _mistral_v03(),
        _deepseek_r1(),
        _phi3(),
        _glm(),
    )


def family(name: str) -> Family:
    return next(found for found in families() if found.name == name)
