"""The top-level model: embedding -> transformer block -> final norm -> losses or logits at chosen rows.

Composed from Megatron-Core's building blocks rather than derived from ``GPTModel``: positions are per token, and the
output projection runs only where it is needed.

Legend: B batch (1 in training), S rows of the sequence, H hidden size, R chosen rows, V real vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from llada_mega.config.model import ModelConfig
from llada_mega.models.config import padded_vocab_size
from llada_mega.models.dispatch import dispatch_locally
from llada_mega.models.embedding import EmbeddingNoise, NoisyEmbedding
from llada_mega.models.layer_spec import block_spec
from llada_mega.models.logits import RowLosses, chunked_cross_entropy, row_logits
from llada_mega.models.mask_carrier import unpack
from llada_mega.models.rotary import rotary_angles, rotary_factors
from llada_mega.parallel import ParallelGroups


class BlockDiffusionModel(LanguageModule):
    """A decoder-only transformer whose attention mask, positions and predicted rows are given by the caller.

    ``config`` is Megatron's ``TransformerConfig`` (its schedules and optimizers look for it there); ``model_config`` is
    ours. Attributes of one pipeline stage: ``embedding`` when ``pre_process``, ``output_layer`` when ``post_process``.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TransformerConfig,
        groups: ParallelGroups,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=groups.collection)
        self.model_type = ModelType.encoder_or_decoder
        self.model_config = model_config
        self.groups = groups
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = model_config.tie_embeddings
        vocab_size = padded_vocab_size(model_config.vocab_size, groups.tp.size())
        if pre_process:
            self.embedding = NoisyEmbedding(
                config,
                vocab_size,
                model_config.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.decoder = TransformerBlock(
            config,
            block_spec(model_config, config, groups.pp.rank(), vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        dispatch_locally(self.decoder, groups)
        if post_process:
            # rows are chosen from the whole sequence, so this layer never sees it split
            output_config = copy.copy(config)
            output_config.sequence_parallel = False
            output_config.gradient_accumulation_fusion = False  # its gradient is made with the loss
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=output_config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_bias_add=False,
                skip_weight_param_allocation=pre_process and model_config.tie_embeddings,
                tp_group=groups.tp,
            )
        self.register_load_state_dict_post_hook(_want_no_extra_state)

    def _set_attention_backend(self) -> None:
        """Megatron chooses TransformerEngine's attention here, through environment variables; ours reads none."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hidden states from the previous pipeline stage (called by Megatron's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids_BS: Tensor,
        position_ids_BS: Tensor,
        mask_carrier: Tensor,
        *,
        padding_mask_BS: Tensor | None = None,
        logit_rows_R: Tensor | None = None,
        labels_R: Tensor | None = None,
        weights_R: Tensor | None = None,
        embedding_noise: EmbeddingNoise | None = None,
    ) -> Tensor | RowLosses:
        """Run this pipeline stage.

        Args:
            input_ids_BS: int64 token ids, MASK included.
            position_ids_BS: int64 positions for the rotary embedding.
            mask_carrier: int32 CPU tensor from :func:`llada_mega.models.mask_carrier.pack`, over the S rows. Where it
                names the logit rows, the last layer computes those alone, and of all tokens they alone count in its
                expert load.
            padding_mask_BS: bool, True = padding, which never counts in expert load.
            logit_rows_R: int64 indices b * S + s of the rows to predict, on any device; None = all, in that order.
            labels_R: int64 token ids; with them the last stage returns losses instead of logits.
            weights_R: float weights of the rows' losses; default 1.
            embedding_noise: noise for the masked rows; only the first stage uses it.

        Returns:
            Before the last stage: hidden states ``[S (/tp), B, H]``. On the last: :class:`RowLosses`, or logits
            ``[R, V]`` in fp32 at least.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids_BS, position_ids_BS, embedding_noise)
        rotary = rotary_factors if self.config.transformer_impl == "local" else rotary_angles
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=mask_carrier,
            rotary_pos_emb=rotary(position_ids_BS, self.model_config, self.config.params_dtype),
            padding_mask=self._local_padding(padding_mask_BS),
        )
        if not self.post_process:
            return hidden
        chosen = unpack(mask_carrier).chosen is not None  # then the last layer returned the logit rows
        hidden_RH = self._select_rows(hidden, None if chosen else logit_rows_R)
        vocab_size, tp_group = self.model_config.vocab_size, self.groups.tp
        weight = self.output_weight()
        if labels_R is None:
            return row_logits(hidden_RH, weight, vocab_size=vocab_size, tp_group=tp_group)
        if weights_R is None:
            weights_R = torch.ones(labels_R.shape, device=labels_R.device)
        return chunked_cross_entropy(hidden_RH, weight, labels_R, weights_R, vocab_size=vocab_size, tp_group=tp_group)

    def output_weight(self) -> Tensor:
        """This rank's rows of the output matrix ``[V/tp, H]`` (last stage)."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's sharded state with the keys of its TransformerEngine spec: one key a layer, experts on an axis.

        Without the ``_extra_state`` of its modules: pickled FP8 scales in TransformerEngine's, nothing in Megatron's.
        """
        metadata = {**(metadata or {}), "non_homogeneous_layers": True, "singleton_local_shards": False}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if "._extra_state" not in key}

    def _local_padding(self, padding_mask_BS: Tensor | None) -> Tensor | None:
        """The part of the padding mask that belongs to this rank's slice of the sequence; None in a dense model."""
        if padding_mask_BS is None or not self.model_config.is_moe:
            return None
        if self.config.sequence_parallel:
            return padding_mask_BS.chunk(self.groups.tp.size(), dim=1)[self.groups.tp.rank()]
        return padding_mask_BS

    def _select_rows(self, hidden_SBH: Tensor, rows_R: Tensor | None) -> Tensor:
        if self.config.sequence_parallel:  # every rank computes on all rows: its slice of the gradient is already whole
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_SBH, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        hidden_NH = hidden_SBH.transpose(0, 1).flatten(0, 1)
        if rows_R is None:
            return hidden_NH
        return hidden_NH.index_select(0, rows_R.to(hidden_NH.device, non_blocking=True))


def _want_no_extra_state(model: torch.nn.Module, incompatible_keys: Any) -> None:
    """Strict loading does not ask for what :meth:`BlockDiffusionModel.sharded_state_dict` leaves out."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not key.endswith("._extra_state")]
