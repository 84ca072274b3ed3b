"""The tokenizer in the model folder of an encoder: it says where the response begins."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# The prompt's turns and the response, as the backbone reads them: `[CLS] prompt [SEP] response
# [SEP]`. Of a prompt alone, which trainers and harnesses render beside it, what is before the
# response; that has no score.
ENCODER_TEMPLATE = (
    "{% set answered = messages[-1]['role'] == 'assistant' %}"
    "{{ cls_token }}{% for message in (messages[:-1] if answered else messages) %}"
    "{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{{ sep_token }}{% if answered %}{{ messages[-1]['content'] }}{{ sep_token }}{% endif %}"
)
SURFACE = "surface"


class ArmoTokenizer(PreTrainedTokenizerFast):
    """An encoder's tokenizer, with a chat template that separates prompt and response.

    Where the model measures surface features of responses, it also gives `surface`, those of each
    text's response: they cannot be told from token ids, which know no line breaks.
    """

    @property
    def measures(self) -> bool:
        """Whether it gives `surface`."""
        # No argument of an own `__init__`: Transformers takes classes that have one for such as
        # build their tokenizer themselves, and does not read the one in the folder.
        return bool(self.init_kwargs.get("measures"))

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, measures: bool) -> "ArmoTokenizer":
        """Make one that tokenises as `tokenizer` does."""
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return cls(
            tokenizer_object=backend,
            **{
                name: token if isinstance(token, str) else token.content
                for name, token in tokenizer.special_tokens_map.items()
                if not isinstance(token, list)
            },
            model_max_length=tokenizer.model_max_length,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            chat_template=ENCODER_TEMPLATE,
            measures=measures,
        )

    def __call__(self, text: Any = None, text_pair: Any = None, **options: Any) -> BatchEncoding:
        """Tokenise as any tokenizer does, and measure the responses."""
        encoded: BatchEncoding = super().__call__(text, text_pair, **options)
        if self.measures and text is not None and not options.get("is_split_into_words"):
            single = isinstance(text, str)
            texts, pairs = ([text], [text_pair]) if single else (text, text_pair)
            if text_pair is None and texts and not isinstance(texts[0], str):
                texts, pairs = zip(*texts, strict=True)  # a list of pairs
            elif text_pair is None:
                pairs = None
            surface = self._measure(texts, pairs)
            if surface is not None:
                tensors = options.get("return_tensors") is not None
                plain = surface[0] if single and not tensors else surface
                encoded[SURFACE] = plain if tensors else plain.tolist()
        return encoded

    def _measure(
        self, texts: Sequence[Any], responses: Sequence[Any] | None
    ) -> torch.Tensor | None:
        """Measure the responses; None if a text has none, which the model then says."""
        from armo.data.surface import surface_features  # only models that measure need it

        if responses is None:
            parts = [text.removesuffix(self.sep_token).split(self.sep_token) for text in texts]
            if any(len(part) != 2 for part in parts):
                return None
            responses = [part[1] for part in parts]
        return surface_features(list(responses))
