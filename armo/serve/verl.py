"""The reward function of a model for verl, tested with its version 0.9.1.

```
reward.custom_reward_function.path=pkg://armo.serve.verl
reward.custom_reward_function.name=compute_score
+reward.custom_reward_function.reward_kwargs.model=checkpoints/demo/model
```

The column `extra_info` of the data has to hold the messages of the prompt, as `raw_prompt`: verl's
default trainer gives them to no reward function itself.
"""

import threading
from collections.abc import Mapping
from typing import Any

from armo.model.reward_model import ArmoRewardModel
from armo.serve.rewards import LIMIT, Rewards

_LOADING = threading.Lock()
_LOADED: dict[tuple[str, str, float], Rewards] = {}


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    model: str,
    device: str = "auto",
    limit: float = LIMIT,
    prompt_key: str = "raw_prompt",
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
) -> dict[str, float]:
    """Score one response, as verl's reward managers call it: from many threads, one row each.

    Rows that wait while a pass runs go into the next one together. The model is loaded once per
    process, at the first call; there are `reward.num_workers` processes.

    Args:
        data_source: Not used.
        solution_str: The response.
        ground_truth: Not used.
        extra_info: Holds the prompt. With `trainer.use_v1=False` the reward managers `naive`,
            `remote` and `rate_limited` put it there; otherwise the data has to.
        model: The model folder; this and the next three come from `reward_kwargs`.
        device: Of the backbone.
        limit: As for `Rewards`.
        prompt_key: Where in `extra_info` the prompt is: messages, or the text of a user turn.
        reward_router_address: Of verl's own reward model; not used.
        reward_model_tokenizer: Likewise.

    Returns:
        `score`, and by name the adjusted reward of each objective, for `algorithm.gdpo_reward_keys`
        (with `trainer.use_v1=False`) and the log. All are finite.

    Raises:
        ValueError: If there is no prompt, or it cannot be read.
    """
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise ValueError(
            f"`extra_info` has no prompt under {prompt_key!r}, but {sorted(extra_info or {})}; put "
            f"the messages into that column of the data"
        )
    rewards = _rewards(model, device, limit)
    turns = prompt if isinstance(prompt, str) else list(prompt)
    batch = rewards.rate([turns], [solution_str])
    by_name = zip(batch.out.objectives, batch.adjusted[0].tolist(), strict=True)
    return {**dict(by_name), "score": float(batch.score[0])}


def _rewards(model: str, device: str, limit: float) -> Rewards:
    key = (model, device, limit)
    with _LOADING:
        if key not in _LOADED:
            loaded = ArmoRewardModel.from_pretrained(model, device=device)
            _LOADED[key] = Rewards(loaded, limit=limit)
        return _LOADED[key]
