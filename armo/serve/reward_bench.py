"""The pipeline that RewardBench's run scripts build around a model, for models of armo.

Tested with RewardBench 0.1.4 beside Transformers 4.56, the oldest that armo runs with. RewardBench
pins an older one, from which it imports two texts; they are no longer there, and may be empty:

```
from transformers.models.llama import modeling_llama

modeling_llama._CONFIG_FOR_DOC = modeling_llama.LLAMA_INPUTS_DOCSTRING = ""
from rewardbench import REWARD_MODEL_CONFIG

REWARD_MODEL_CONFIG["checkpoints/demo/model"] = {
    "model_builder": ArmoRewardModel.from_pretrained,
    "pipeline_builder": RewardBenchPipeline,
    "quantized": False,
    "custom_dialogue": False,
    "model_type": "Seq. Classifier",
    "torch_dtype": torch.float32,
}
```
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from armo.model.reward_model import ArmoRewardModel


class RewardBenchPipeline:
    """Scores texts that the chat template of the model's tokenizer has rendered.

    Nothing is cut here, whatever `truncation` and `max_length` are: a text without its end has no
    response, and what is too long the model cuts by its own rule. Tokens go where the model is.

    Attributes:
        task: Not used.
        model: The scoring model; the scripts replace it by one that is prepared for the device.
        tokenizer: That of the model folder.
    """

    def __init__(
        self, task: str, model: ArmoRewardModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Take what the scripts pass."""
        self.task = task
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(
        self,
        samples: Sequence[str],
        *,
        return_inputs: bool = False,
        batch_size: int = 1,
        truncation: bool = False,
        padding: bool = True,
        max_length: int | None = None,
        function_to_apply: str = "none",
        return_token_type_ids: bool = False,
    ) -> Float[Tensor, "batch 1"] | tuple[Float[Tensor, "batch 1"], Any]:
        """Score whole conversations as text.

        Args:
            samples: The texts.
            return_inputs: Whether to return the tokens too.
            batch_size: Not used, like the next five: all samples are one batch.
            truncation: See there.
            padding: See there.
            max_length: See there.
            function_to_apply: See there.
            return_token_type_ids: See there.

        Raises:
            TokenRowError: Naming the text that is no whole conversation.
        """
        inputs = self.tokenizer(
            list(samples), padding=True, truncation=False, return_tensors="pt"
        ).to(self.model.device)
        logits = self.model(**inputs).logits
        return (logits, inputs) if return_inputs else logits
