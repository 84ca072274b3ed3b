"""A reward function for OpenRLHF, which reads it from a file of the user.

Tested with OpenRLHF 0.11.2. Two lines are the file, which `--reward.remote_url my_reward.py` names:

```
from armo.serve.openrlhf import OpenRLHFReward
reward_func = OpenRLHFReward("checkpoints/demo/model", policy="Qwen/Qwen3-8B")
```
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from armo.model.reward_model import ArmoRewardModel
from armo.serve.completions import ControlText, Turns, load_tokenizer, shared_length
from armo.serve.rewards import LIMIT, Rewards

# Name of the log that says which responses cannot have a score.
UNSCORABLE = "unscorable"
# Stand in for turns, to see what a template writes around them.
MARKS = tuple(f"armoturn{number}" for number in range(4))


class RenderedPrompts:
    """Reads the turns of prompts that the chat template of a policy has rendered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look at what the template writes around turns of system, user and assistant."""
        tokens = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
        self._special = re.compile(tokens or r"(?!)")
        self._control = ControlText(tokenizer)
        # Without a system turn first: some templates then write one of their own.
        self._forms = [_form(tokenizer, system=system) for system in (False, True)]

    def turns(self, prompt: str) -> Turns:
        """Take a rendered prompt apart; one without special tokens is plain text already.

        Raises:
            ValueError: If it has special tokens, and is not how the template renders turns.
        """
        if not self._special.search(prompt):
            return prompt
        for form in self._forms:
            turns = form.read(prompt) if form is not None else None
            # Special tokens within a turn are around one that the form has no place for.
            if turns and not any(self._special.search(turn["content"]) for turn in turns):
                return turns
        raise ValueError(
            f"the chat template of `policy` does not render prompts like {prompt[:200]!r}: is it "
            f"the tokenizer that OpenRLHF trains with?"
        )

    def prompt(self, text: str) -> str:
        """Find the prompt that a text begins with: up to where the last response is opened.

        Raises:
            ValueError: If the template opens none in it.
        """
        opening = next((form.after for form in self._forms if form is not None), "")
        before, found, _ = text.rpartition(opening) if opening else ("", "", "")
        if not found:
            raise ValueError(f"the chat template of `policy` opens no response in {text[:200]!r}")
        return before + found

    def response(self, query: str, prompt: str) -> str:
        """Take the response from the whole text, without the special tokens that end it.

        Of a prompt that was too long, only the end is there.

        Raises:
            ValueError: If the text does not begin with the end of its prompt.
        """
        shared = shared_length(prompt, query)
        if not shared:
            raise ValueError(
                f"the query does not begin with its prompt: {query[:100]!r}, {prompt[:100]!r}"
            )
        return self._control.without_end(query[shared:])


class OpenRLHFReward:
    """What OpenRLHF calls as `reward_func(queries, prompts, labels)`, from many threads at once.

    Rows that wait while a pass runs go into the next one together. Each engine that generates
    loads a model of its own.
    """

    def __init__(
        self,
        model: ArmoRewardModel | str | Path,
        *,
        policy: str | Path | PreTrainedTokenizerBase,
        limit: float = LIMIT,
    ) -> None:
        """Make the reward function of a model.

        Args:
            model: As for `Rewards`.
            policy: Tokenizer of the policy, or its folder or hub id. Prompts that its chat template
                rendered (`--data.apply_chat_template`) are taken apart; others are one user turn.
            limit: As for `Rewards`.

        Raises:
            ValueError: If there is no such tokenizer.
        """
        self.rewards = Rewards(model, limit=limit)
        if isinstance(policy, str | Path):
            policy = load_tokenizer(policy)
        self._rendered = RenderedPrompts(policy)

    def __call__(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **more: Any
    ) -> dict[str, Any]:
        """Score responses.

        Args:
            queries: Prompt and response with all special tokens.
            prompts: The prompts.
            labels: Not used, like what else may come.
            more: See there.

        Returns:
            `rewards`, the score; `scores`, the probability that the response is preferred to one
            with the mean score of the training responses, for `--algo.dynamic_filtering_range`; and
            `extra_logs`, the adjusted reward of each objective, and as `unscorable` a 1 where there
            is no score. Tensors, one number per query.

        Raises:
            ValueError: If a prompt cannot be read.
        """
        turns = [self._rendered.turns(prompt) for prompt in prompts]
        rendered = zip(queries, prompts, strict=True)
        texts = [self._rendered.response(query, prompt) for query, prompt in rendered]
        batch = self.rewards.rate(turns, texts)
        score = batch.score.float()
        columns = zip(batch.out.objectives, batch.adjusted.float().unbind(1), strict=True)
        return {
            "rewards": score,
            "scores": torch.sigmoid(float(self.rewards.model.beta) * score),
            "extra_logs": {**dict(columns), UNSCORABLE: batch.unscorable.float()},
        }


class _Form:
    """What a template writes: before the first turn, between turns, and after the last one."""

    def __init__(self, before: str, between: Mapping[str, str], after: str, system: bool) -> None:
        self.before, self.between, self.after, self.system = before, between, after, system

    def read(self, prompt: str) -> list[dict[str, str]] | None:
        """Split a prompt into turns; None if it is not of this form."""
        if not (prompt.startswith(self.before) and prompt.endswith(self.after)):
            return None
        inner = prompt[len(self.before) : len(prompt) - len(self.after)]
        turns = []
        if self.system:
            text, found, inner = inner.partition(self.between["system"])
            if not found:
                return None
            turns.append({"role": "system", "content": text})
        splits = re.escape(self.between["user"]) + "|" + re.escape(self.between["assistant"])
        parts = re.split(f"({splits})", inner)
        for k, text in enumerate(parts[::2]):
            role = ("user", "assistant")[k % 2]
            if 2 * k + 1 < len(parts) and parts[2 * k + 1] != self.between[role]:
                return None
            turns.append({"role": role, "content": text})
        return turns if turns[-1]["role"] == "user" else None


def _form(tokenizer: PreTrainedTokenizerBase, *, system: bool) -> _Form | None:
    """Find the form of a template; None if it has none, or refuses or moves a system turn."""
    roles = [*(["system"] if system else []), "user", "assistant", "user"]
    marked = [{"role": r, "content": m} for r, m in zip(roles, MARKS, strict=False)]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):
        return None
    marks = "|".join(MARKS)
    if re.findall(marks, str(text)) != [*MARKS[: len(roles)]]:
        return None
    parts = re.split(marks, str(text))
    return _Form(parts[0], dict(zip(roles, parts[1:-1], strict=False)), parts[-1], system)
