"""A model to ask: logits of any layout, and generation.

Legend: B batch, S rows, L tokens of a sequence, V vocabulary (MASK included, padding for tensor parallelism not).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llada_kernels import IntervalMask
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.data.tokenizer import Tokenizer
from llada_mega.diffusion.visibility import build_visibility
from llada_mega.errors import ConfigError
from llada_mega.inference.decoding import DecodingOptions, Generation, StepCallback, decode
from llada_mega.models import BlockDiffusionModel, mask_carrier


class LoadedModel:
    """A whole model in this process, for evaluation and generation.

    Attributes:
        model: the Megatron-Core model, in evaluation mode.
        config: its shape.
        tokenizer: None when the directory has none.
    """

    def __init__(self, model: BlockDiffusionModel, tokenizer: Tokenizer | None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.model_config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def logits(
        self,
        token_ids_BS: Tensor,
        layout: str = "bdlm",
        block_size: int = 32,
        document_lengths: Sequence[Sequence[int]] | None = None,
        block_origin: str = "document",
    ) -> Tensor:
        """Logits of every position: float32 [B, S, V] on the CPU.

        Args:
            token_ids_BS: int64. Layout ``ar`` and ``mdlm``: S = L tokens; ``bdlm``: S = 2L, [noisy L ; clean L].
            layout: ``ar`` (causal), ``mdlm`` (eq. (4)) or ``bdlm`` (eq. (3)).
            block_size: tokens of a block, for ``bdlm``.
            document_lengths: for each row of the batch, lengths that tile its L tokens; default one document. Positions
                restart in each document.
            block_origin: ``document`` or ``sequence``, where block 0 starts.
        Raises:
            ConfigError: the arguments do not fit each other; the message names them.
        """
        token_ids_BS = torch.as_tensor(token_ids_BS)
        if token_ids_BS.dim() != 2:
            raise ConfigError(f"token_ids has shape {list(token_ids_BS.shape)}; give [batch, tokens]")
        rows, length = token_ids_BS.shape[1], token_ids_BS.shape[1]
        if layout == "bdlm":
            if rows % 2:
                raise ConfigError(f"layout=bdlm needs [noisy ; clean], an even number of tokens, but got {rows}")
            length = rows // 2
        lengths_B = document_lengths if document_lengths is not None else [[length]] * len(token_ids_BS)
        if len(lengths_B) != len(token_ids_BS) or any(sum(lengths) != length for lengths in lengths_B):
            raise ConfigError(
                f"document_lengths={list(lengths_B)} do not tile {len(token_ids_BS)} rows of {length} tokens"
            )
        outputs = []
        for tokens_S, lengths in zip(token_ids_BS, lengths_B, strict=True):
            visibility = build_visibility(
                layout,
                lengths,
                padding=[False] * len(lengths),
                block_size=block_size,
                block_origin=block_origin,
                clean_tokens="all",
            )
            position_L = torch.cat([torch.arange(count) for count in lengths])
            position_S = position_L.repeat(rows // length)
            outputs.append(self._forward(tokens_S, position_S, visibility.mask, torch.arange(rows)))
        return torch.stack(outputs)

    def generate(
        self,
        prompt_ids: Sequence[int] | Tensor,
        max_new_tokens: int = 128,
        block_size: int = 32,
        steps: int = 32,
        threshold: float = 0.95,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_at_eos: bool = True,
        on_step: StepCallback | None = None,
    ) -> Generation:
        """Answer a prompt of token ids, block by block; the arguments are those of :class:`DecodingOptions`.

        Raises:
            ConfigError: the model has no MASK token, an argument is out of range, or the text would become too long.
        """
        options = DecodingOptions(max_new_tokens, block_size, steps, threshold, temperature, top_p, seed, stop_at_eos)
        config, prompt = self.config, torch.as_tensor(prompt_ids, dtype=torch.int64).flatten().tolist()
        if config.mask_token_id is None:
            raise ConfigError("this model has no MASK token; convert it with llada-mega convert import and train it")
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise ConfigError(f"prompt_ids holds {wrong[0]}, outside the vocabulary of {config.vocab_size} tokens")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed the model's "
                f"{config.max_position_embeddings} positions; shorten one"
            )
        known = config.vocab_size if self.tokenizer is None else min(self.tokenizer.vocab_size, config.vocab_size)
        return decode(
            self.block_causal_logits,
            prompt,
            options,
            mask_token_id=config.mask_token_id,
            eos_token_id=config.eos_token_id,
            forbidden=range(known, config.vocab_size),
            on_step=on_step,
        )

    @torch.no_grad()
    def block_causal_logits(self, tokens_S: Tensor, block_size: int, rows_R: Tensor) -> Tensor:
        """Logits float32 [R, V] at some rows of one sequence, each row seeing up to the end of its own block."""
        mask = IntervalMask.block_causal([len(tokens_S)], block_size)
        return self._forward(tokens_S, torch.arange(len(tokens_S)), mask, rows_R)

    def _forward(self, tokens_S: Tensor, position_S: Tensor, mask: IntervalMask, rows_R: Tensor) -> Tensor:
        device = self.device
        logits_RV = self.model(
            tokens_S.to(device)[None],
            position_S.to(device)[None],
            mask_carrier.pack(mask),
            padding_mask_BS=torch.zeros(1, len(tokens_S), dtype=torch.bool, device=device),
            logit_rows_R=rows_R.to(device),
        )
        return logits_RV.float().cpu()
