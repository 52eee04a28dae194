"""Drafting with the target's first layers, inside vLLM's model runner V1."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig
from vllm.v1.sample import rejection_sampler
from vllm.v1.spec_decode.draft_model import DraftModelProposer

from layerskip.vllm_plugin import cpu_sampling
from layerskip.vllm_plugin.config import METHOD, draft_token_ids
from layerskip.vllm_plugin.draft_head import DraftHead
from layerskip.vllm_plugin.early_exit import decoder_of, early_exit_view

logger = init_logger("vllm.layerskip")


class LayerSkipProposer(DraftModelProposer):  # type: ignore[misc]
    """Drafts tokens with the target's layers 0..E-1, its norm and its head, in the target's KV cache.

    Verification runs all layers, so it has written keys and values of the first E layers for every
    committed token: a draft of d tokens is d one-token steps, without a first pass over what was
    verified. The steps write into slots that the scheduler reserved beyond the committed tokens.
    The next verification writes the same slots again, and those of rejected tokens are overwritten
    before they are read.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.settings: dict[str, Any] = vllm_config.additional_config[METHOD]
        self.exit_layer: int = self.settings["exit_layer"]
        self.draft_head: DraftHead | None = None
        if current_platform.is_cpu() and (names := cpu_sampling.repair(rejection_sampler)):
            logger.info("layerskip: replaced what is wrong in vLLM on CPU: %s", ", ".join(names))

    def load_model(self, target_model: nn.Module) -> None:
        """Take the draft model from the target; no weight is loaded."""
        modules = {
            module
            for layer in decoder_of(target_model).layers[: self.exit_layer]
            for module in layer.modules()
        }
        attention = {
            name: module
            for name, module in self.compilation_config.static_forward_context.items()
            if module in modules
        }
        for name, module in attention.items():
            if not isinstance(module.get_kv_cache_spec(self.vllm_config), AttentionSpec):
                raise ValueError(
                    f"layerskip: {name} keeps a recurrent state, which drafting would change:"
                    " choose an exit_layer below it"
                )
        # These layers are in the target's KV cache groups already, so nothing is allocated for them.
        self._draft_attn_layer_names = set(attention)
        self.supports_mm_inputs = False
        self.model = early_exit_view(
            target_model,
            self.exit_layer,
            self.vllm_config,
            enforce_eager=bool(self.speculative_config.enforce_eager),
        )
        token_ids = draft_token_ids(
            self.vllm_config.model_config, self.settings["draft_vocab_size"]
        )
        if token_ids is not None and DraftHead.fits(
            lm_head := getattr(self.model, "lm_head", None)
        ):
            self.draft_head = DraftHead(lm_head, torch.tensor(token_ids, device=self.device))
        logger.info(
            "layerskip: drafting %d tokens with the first %d layers, out of %s",
            self.num_speculative_tokens,
            self.exit_layer,
            f"{len(token_ids)} tokens" if token_ids and self.draft_head else "all tokens",
        )

    def validate_same_kv_cache_group(self, kv_cache_config: KVCacheConfig) -> None:
        """Refuse an exit behind layers of different attention, whose block tables differ."""
        groups = [
            set(group.layer_names) & self._draft_attn_layer_names
            for group in kv_cache_config.kv_cache_groups
        ]
        if sum(map(bool, groups)) != 1:
            raise ValueError(
                f"layerskip: the first {self.exit_layer} layers are in several KV cache groups (local"
                " and global attention): choose a lower exit_layer, or give"
                " --disable-hybrid-kv-cache-manager"
            )

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: Any,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> torch.Tensor:
        """Draft tokens for each request, one step a token.

        Args:
            num_speculative_tokens: d, the number of steps; 0 where the batch is too large to draft.
            target_token_ids: Not used.
            target_positions: [num_tokens] positions of the tokens just verified.
            target_hidden_states: Not used.
            next_token_ids: [batch_size] the last committed tokens, not yet in the KV cache.
            token_indices_to_sample: [batch_size] index of the last accepted token of each request, or
                None if that is the last one of each.
            common_attn_metadata: Attention metadata of the verification.
            sampling_metadata: Sampling parameters of the requests.
            mm_embed_inputs: Not used.
            num_rejected_tokens_gpu: [batch_size] rejected draft tokens, which count in `seq_lens`.
            slot_mappings: Not used.

        Returns:
            [batch_size, d] token ids.
        """
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        batch_size = common_attn_metadata.batch_size()
        if num_speculative_tokens == 0:
            return torch.empty(batch_size, 0, device=self.device, dtype=torch.int64)
        if token_indices_to_sample is None:
            token_indices_to_sample = common_attn_metadata.query_start_loc[1:] - 1
        positions = target_positions[token_indices_to_sample]
        metadata = self._one_token_metadata(common_attn_metadata, num_rejected_tokens_gpu)
        mode, padded_size, num_tokens_across_dp = self._determine_batch_execution_and_padding(
            batch_size
        )

        token_ids, drafts, probs = next_token_ids, [], []
        for step in range(num_speculative_tokens):
            positions = self._update_positions_dependent_metadata(
                positions, metadata, batch_size, padded_size, self.block_size
            )
            _, layer_metadata = self.build_per_group_and_layer_attn_metadata(
                metadata, draft_index=step + 1
            )
            self.input_ids[:batch_size] = token_ids
            with set_forward_context(
                layer_metadata,
                self.vllm_config,
                num_tokens=padded_size,
                num_tokens_across_dp=num_tokens_across_dp,
                cudagraph_runtime_mode=mode,
                slot_mapping=self._get_slot_mapping(padded_size),
            ):
                hidden_states = self.model(
                    input_ids=self.input_ids[:padded_size],
                    positions=self._get_positions(padded_size),
                    inputs_embeds=None,
                )
            token_ids, step_probs = self._sample_draft_tokens(
                hidden_states[:batch_size], sampling_metadata
            )
            drafts.append(token_ids)
            if step_probs is not None:
                probs.append(step_probs)
        if probs:
            self._last_draft_probs = torch.stack(probs, dim=1).contiguous()
        return torch.stack(drafts, dim=1)

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return each request's best draft token; called unless drafts are sampled."""
        if self.draft_head is not None:
            return self.draft_head.top_token_ids(hidden_states)
        return super()._greedy_sample(hidden_states)

    def _one_token_metadata(self, verified: Any, num_rejected: torch.Tensor | None) -> Any:
        """Return attention metadata for one query a request, behind its last accepted token."""
        batch_size = verified.batch_size()
        seq_lens = verified.seq_lens[:batch_size].clone()
        if num_rejected is not None:
            seq_lens -= num_rejected
        upper_bound = verified.seq_lens_cpu_upper_bound
        return replace(
            verified,
            num_reqs=batch_size,
            num_actual_tokens=batch_size,
            max_query_len=1,
            query_start_loc=self.arange[: batch_size + 1],
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: batch_size + 1]).clone(),
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound.clone(),
        )
