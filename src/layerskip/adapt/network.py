"""The exit adapter as a network that is trained: the decoder's own layer, with gradients.

Each step builds the layer from the parameters with the loader that decoding uses, so each family trains
exactly the layer that it runs. Shapes: B rows, T positions, D hidden size, V draft vocabulary.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model import FAMILIES, Files
from layerskip.model.checkpoint import read
from layerskip.model.decoder import Decoder
from layerskip.model.exit_adapter import TensorDict, adapter_architecture, joined
from layerskip.model.loader import ADAPTER_PROJECTION, build_adapter

_LOG_SCALE = "log_scale"


def shifted(states: Tensor) -> Tensor:
    """Move states [B, T, D] one position on; the first position gets zeros."""
    return F.pad(states, (0, 0, 1, -1))


class UnrolledView:
    """Attention of drafts of growing depth, all positions at once (an `AttentionView`).

    A token drafted at depth k attends to entries that were made with true states up to its own position
    less k - 1, and to the entries of the k - 1 drafted tokens before it and its own. Pass j of the layer
    makes the entries of depth j at every position; the mask of pass k picks one entry a position.
    """

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self.positions = torch.arange(length, device=device).expand(rows, length)
        self._keys: dict[int, list[Tensor]] = {}  # by layer
        self._values: dict[int, list[Tensor]] = {}
        self._depth = 0

    def next_depth(self) -> None:
        """Begin the next pass."""
        self._depth += 1

    def write(self, layer: int, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """See `CacheView.write`; the entries of all passes so far are one sequence."""
        keys, values = keys_values.permute(2, 0, 3, 1, 4)
        of_layer = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        of_layer[0].append(keys)
        of_layer[1].append(values)
        return torch.cat(of_layer[0], dim=2), torch.cat(of_layer[1], dim=2)

    def mask(self, window: int | None, dtype: torch.dtype, groups: int) -> Tensor:
        """See `CacheView.mask`."""
        positions, depth = self.positions[0], self._depth
        distance = positions[:, None] - positions  # of a key from its query
        blocks = [distance >= depth - 1]
        blocks += [distance == depth - j for j in range(2, depth + 1)]
        visible = torch.cat(blocks, dim=1)
        if window is not None:
            visible &= (distance < window).repeat(1, depth)
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        mask.masked_fill_(~visible, float("-inf"))
        return mask.repeat(groups, 1)[None, None]


class AdapterNetwork:
    """Parameters of an exit adapter, and its passes.

    Args:
        base: the frozen model; its embedding and head are not touched.
        parameters: of the layer, the final norm and the projection, by their names in the file.
        log_scale: logarithm of the factor on the logits.

    Attributes:
        parameters: all that is trained, float32.
    """

    def __init__(self, base: Decoder, parameters: dict[str, Tensor], log_scale: float) -> None:
        self._base = base
        self._architecture = adapter_architecture(base.architecture)
        # Sorted, so that sums over all parameters are the same after a resume.
        self.parameters = {n: parameters[n].detach().float().clone() for n in sorted(parameters)}
        self.parameters[_LOG_SCALE] = torch.tensor(log_scale)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters that an adapter's file holds."""
        return {n: p for n, p in self.parameters.items() if n != _LOG_SCALE}

    @property
    def logit_scale(self) -> Tensor:
        """Factor on the logits."""
        return self.parameters[_LOG_SCALE].exp()

    def outputs(self, exit_states: Tensor, last_states: Tensor, depths: int) -> list[Tensor]:
        """Draft from every position, token by token.

        Args:
            exit_states: [B, T, D], leaving layer E.
            last_states: [B, T, D], leaving layer L.
            depths: number of tokens drafted one after another.

        Returns:
            For each depth the normed states [B, T, D] that the head reads. Those of depth k at position
            t come after k - 1 drafted tokens; the first k - 1 positions mean nothing.
        """
        decoder, projection = build_adapter(
            self._base, self._architecture, TensorDict(self.tensors), dtype=torch.float32
        )
        b, t, d = exit_states.shape
        view = UnrolledView(b, t, exit_states.device)
        states, outputs = last_states, []
        for _ in range(depths):
            view.next_depth()
            inputs = joined(exit_states, shifted(states))
            x = projection(inputs.view(b * t, 2 * d)).view(b, t, d)
            states = decoder.run_view(x, 0, len(decoder.layers), view, t)
            outputs.append(decoder.final_norm(states.reshape(b * t, d)).view(b, t, d))
        return outputs


def head_rows(files: Files, token_ids: Sequence[int]) -> Tensor:
    """Return the rows of a model's head for some tokens, [n, D] float32."""
    names = FAMILIES[files.architecture.family].names
    name = names.embedding if files.tied else names.head
    return files.tensors.read(f"{name}.weight")[torch.tensor(token_ids)].float()


def initial_parameters(
    files: Files, projection: Tensor, seed: int = 0, *, output_scale: float = 0.0
) -> dict[str, Tensor]:
    """Return the parameters to begin with: a copy of the base's last layer that adds nothing yet.

    Args:
        files: of the base.
        projection: [D, 2 D], from `ridge.fit_projection`; its product alone is a first guess of h_L.
        output_scale: factor on what attention and MLP add.
        seed: of the MLP that replaces a mixture of experts.
    """
    a = files.architecture
    family = FAMILIES[a.family]
    names = family.names
    last, first = names.layer.format(a.n_layers - 1), names.layer.format(0)
    outputs = [names.attention_out, names.down]
    if names.attention_post_norm is not None and names.mlp_post_norm is not None:
        outputs = [names.attention_post_norm, names.mlp_post_norm]
    parameters = {f"{ADAPTER_PROJECTION}.weight": projection}
    of_mixture = re.escape(last + names.router) + "|" + re.escape(last + names.expert.split("{")[0])
    for name in files.tensors.names():
        is_needed = name.startswith(last) and not name.endswith(names.ignored)
        if is_needed and not (a.mixture is not None and re.match(of_mixture, name)):
            parameters[first + name.removeprefix(last)] = read(files, name, "halves").float()
    if a.mixture is not None and f"{first}{names.down}.weight" not in parameters:
        generator = torch.Generator().manual_seed(seed)
        sizes = {names.down: (a.hidden_size, a.ffn_size)}
        sizes |= dict.fromkeys(names.gate_up, (a.ffn_size, a.hidden_size))
        for name, size in sizes.items():
            weight = torch.randn(size, generator=generator) * size[1] ** -0.5
            parameters[f"{first}{name}.weight"] = weight
    for output in outputs:
        offset = 0.0 if output in (names.attention_out, names.down) else family.norm_offset
        for name in (f"{first}{output}.weight", f"{first}{output}.bias"):
            if name in parameters:
                parameters[name] = (parameters[name] + offset) * output_scale - offset
    for name in (f"{names.final_norm}.weight", f"{names.final_norm}.bias"):
        if name in files.tensors.names():
            parameters[name] = files.tensors.read(name).float()
    return parameters
