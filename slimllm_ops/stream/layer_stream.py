"""Hidden states that pass through a model one layer at a time, with only that layer's weights in memory.

The model's own code runs: its masks, rotary tables and modules. Each branch is run once per layer and batch, with
its output projection left out, so that the branch returns X, the projection's input. The output that the layer adds
to the residual stream, dense or pruned, is then X[:, S] W + b, with no second forward pass. An MLP of experts is run
in the same way (`slimllm_ops.moments.routing`), but for its router and its activation by code of this package.

Shapes: b blocks of a batch, T tokens of a block, D hidden size, P inputs of an output projection, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from slimllm_ops.checkpoint.layer_reader import LayerReader
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.checkpoint.surgery import recovered_experts, recovered_projection
from slimllm_ops.decide.plan import Decision, LayerPlan
from slimllm_ops.errors import NonFiniteError
from slimllm_ops.models.families import Branch, Family, LayerShape, layer_shape
from slimllm_ops.moments.observation import ObservationSum, Observed
from slimllm_ops.moments.routing import Routed, RoutedStates, RoutedSum, project, route
from slimllm_ops.moments.states import States, StateStore

# Tokens whose logits are computed at once: a vocabulary of 128k in float32 is then 0.5 GB.
LOGIT_TOKENS = 1024
# The read-back of a checkpoint compares the states of this many first tokens: causal, so they need no others.
PROBED_TOKENS = 64
# A norm's gain below this fraction of its largest passes nothing on.
SMALLEST_GAIN = 1e-3

Seen = TypeVar("Seen", bound=Observed)


@dataclass(frozen=True)
class Mean:
    """A sum over tokens, and how many they are."""

    total: float
    count: int

    def merge(self, other: "Mean") -> "Mean":
        """Return the sum over both sets of tokens."""
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


@dataclass(frozen=True)
class DensePass:
    """What a pass of a dense branch leaves: its observation, and squared norms summed over tokens.

    Attributes:
        observed: The branch's observation.
        power: Squared norms of the states after it.
        change: Squared norms of what the layer has added to the states so far; None where that is not measured.
    """

    observed: Observed
    power: Mean
    change: Mean | None = None

    def merge(self, other: "DensePass") -> "DensePass":
        """Return the pass of both sets of tokens."""
        measured = None if self.change is None or other.change is None else self.change.merge(other.change)
        return DensePass(self.observed.merge(other.observed), self.power.merge(other.power), measured)


class LayerStream:
    """The hidden states of batches of token blocks, on their way through a checkpoint.

    Args:
        checkpoint: the model that they pass.
        batches: token ids, each (b, T), int64.
        device: where the layers run; on the CPU in float32, on a GPU in bfloat16.
        store: makes what holds the batches' states; in the device's memory if it is not given.
        measures_change: whether the states that enter a layer are held, to see what it changes.
        intercept: whether recoveries from what `observe` returns may fit an intercept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        batches: list[Tensor],
        device: torch.device,
        store: StateStore = list,
        *,
        measures_change: bool = False,
        intercept: bool = True,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = compute_dtype(device)
        self.batches = batches
        self.store = store
        self._measures_change = measures_change
        self._intercept = intercept
        self._multiplier = checkpoint.family.multiplier(checkpoint.config)
        self._parallel = checkpoint.family.is_parallel(checkpoint.config)
        self._model = _build_skeleton(checkpoint)
        self._reader = LayerReader(checkpoint, self._place)
        self._calls: list[dict[str, Any]] = []
        self._layer: int | None = None
        self._branch_outputs: States | RoutedStates = store()
        self._entered: tuple[int, States] | None = None
        self.hidden = self._embed()

    @property
    def family(self) -> Family:
        """The checkpoint's family."""
        return self.checkpoint.family

    def shape(self, layer: int) -> LayerShape:
        """Return what a layer's branches are made of."""
        return layer_shape(self.checkpoint.config, layer)

    @torch.inference_mode()
    def forward(self, layer: int) -> Mean:
        """Pass a whole layer; return the cosine between its input and output, summed over tokens."""
        module = self._load(layer)
        total, count = 0.0, 0
        for index, before in enumerate(self.hidden):
            after = module(before, **self._calls[layer])
            total += float(functional.cosine_similarity(before.float(), after.float(), dim=-1).double().sum())
            count += before.shape[0] * before.shape[1]
            self.hidden[index] = after
        if not _finite(total):
            self._raise_non_finite(layer, "output")
        return Mean(total, count)

    @torch.inference_mode()
    def observe(self, layer: int, branch: Branch) -> Observed:
        """Run a branch up to its output projection, hold what came out until `apply`, and return its moments."""
        seen, self._branch_outputs = self._begin(branch)
        for normalised, x_bTP in self._run(layer, branch):
            seen.add(x_bTP, normalised)
            self._branch_outputs.append(x_bTP)
        return self.require_finite(seen.packed(), layer, branch).with_intercept(self._intercept)

    @torch.inference_mode()
    def observe_dense(self, layer: int, branch: Branch) -> DensePass:
        """Pass a dense branch; return its moments, and the norms of the states that result.

        The moments are kept for any use, so they have an intercept until they are read. Nothing is held but the
        residual stream, and what entered the layer where its change is measured.
        """
        seen, power, change = self._begin(branch)[0], Mean(0.0, 0), Mean(0.0, 0)
        before = self._entered_by(layer) if self._measures_change else None
        project = self._projected(layer, branch, None)
        for index, (normalised, x_bTP) in enumerate(self._run(layer, branch)):
            output = project(x_bTP)
            added = self.contribution(layer, branch, output)
            seen.add(x_bTP, normalised)
            if added is not output:
                seen.add_powers(_power(output), _power(added))
            power = power.merge(self._add(index, added))
            if before is not None:
                change = change.merge(_summed_power(self.hidden[index] - before[index]))
        observed = self.require_finite(seen.packed(), layer, branch)
        return DensePass(observed, power, None if before is None else change)

    @torch.inference_mode()
    def forward_pruned(self, layer: int, plan: LayerPlan) -> None:
        """Pass a layer as a plan leaves it, without a look at its moments."""
        if plan.dropped:
            return
        family = self.checkpoint.family
        for branch, decision in ((family.attention, plan.attention), (family.mlp, plan.mlp)):
            project = self._projected(layer, branch, decision)
            for index, (_, x_bTP) in enumerate(self._run(layer, branch)):
                self._add(index, self.contribution(layer, branch, project(x_bTP)))

    @torch.inference_mode()
    def apply(self, layer: int, branch: Branch, decision: Decision | None) -> Mean:
        """Add the observed branch's output, pruned by `decision` or dense, to the residual stream.

        Returns:
            The squared norm of the states that result, summed over tokens.
        """
        power = Mean(0.0, 0)
        project = self._projected(layer, branch, decision)
        for index, x_bTP in enumerate(self._branch_outputs):
            power = power.merge(self._add(index, self.contribution(layer, branch, project(x_bTP))))
        self._branch_outputs = self.store()
        return power

    def entering(self, layer: int, branch: Branch) -> States:
        """Return the states that a branch of the layer that is being passed reads.

        They are the residual stream's, but for the MLP of a parallel layer, which reads what the attention reads:
        there they are noted when the layer is first asked for.
        """
        return self._entered_by(layer) if self._parallel else self.hidden

    def _entered_by(self, layer: int) -> States:
        """Return the states that entered a layer, noted when it is first asked for them."""
        if self._entered is None or self._entered[0] != layer:
            noted = self.store()
            for hidden in self.hidden:
                noted.append(hidden)
            self._entered = (layer, noted)
        return self._entered[1]

    @torch.inference_mode()
    def normalise(self, layer: int, branch: Branch, hidden: Tensor) -> Tensor:
        """Return a branch's input (b, T, D) from the residual stream's states (b, T, D)."""
        norm = branch.reading.norm
        return hidden if norm is None else self._load(layer).get_submodule(norm)(hidden)

    @torch.inference_mode()
    def run_branch(self, layer: int, branch: Branch, normalised: Tensor) -> Tensor:
        """Return what enters a branch's output projection (b, T, P), from the branch's input (b, T, D)."""
        module = self._load(layer)
        if branch.reading.experts is not None:
            raise TypeError("a branch of experts has as many output projections: run_experts")
        if branch.reading.activation is not None:
            (name,) = branch.inputs
            return module.get_submodule(branch.reading.activation)(module.get_submodule(name)(normalised))
        call = self._calls[layer] if branch == self.checkpoint.family.attention else {}
        part = module.get_submodule(branch.module)
        with _without(part, branch.names.output):
            output = part(normalised, **call)
        return output[0] if isinstance(output, tuple) else output

    def run_experts(self, layer: int, branch: Branch, normalised: Tensor) -> Routed:
        """Return what enters the output projections of a branch's experts, from the branch's input (b, T, D)."""
        module, read = self._load(layer), branch.reading.experts
        assert read is not None, "a branch without experts has one output projection"
        (gate_up,) = branch.inputs
        activation = module.get_submodule(branch.module).get_submodule(read.activation)
        return route(module.get_submodule(read.router), module.get_parameter(gate_up), activation, normalised)

    def projection(self, layer: int, branch: Branch) -> nn.Linear:
        """Return a branch's output projection, with its weights."""
        return cast(nn.Linear, self._load(layer).get_submodule(branch.output))

    @torch.inference_mode()
    def contribution(self, layer: int, branch: Branch, output: Tensor) -> Tensor:
        """Return what a branch adds to the residual stream (b, T, D), from what its output projection puts out."""
        if (norm := branch.reading.output_norm) is not None:
            output = self._load(layer).get_submodule(norm)(output)
        return output if self._multiplier == 1 else output * self._multiplier

    @torch.inference_mode()
    def change_of_output(self, layer: int, branch: Branch, output: Tensor, change: Tensor) -> Tensor:
        """Return by how much a branch's output must change for what it adds to change so much, all (b, T, D).

        Exact but for a norm of the output, an RMS norm in all families that have one: its divisor is held.
        """
        change = change / self._multiplier
        if (norm := branch.reading.output_norm) is None:
            return change
        gain_D = self._load(layer).get_submodule(norm)(torch.ones_like(output[0, 0]))
        # A dim that the norm takes away cannot be changed through it.
        passes_D = gain_D.abs() > SMALLEST_GAIN * gain_D.abs().max()
        rms = output.float().square().mean(dim=-1, keepdim=True).sqrt().to(output)
        return torch.where(passes_D, change / torch.where(passes_D, gain_D, 1.0), 0.0) * rms

    @torch.inference_mode()
    def negative_log_likelihood(self) -> Mean:
        """Return the next tokens' negative log-likelihood, once every layer is passed."""
        self._unload()
        modules = self._load_outside()
        head = self._model.get_output_embeddings()
        tied = self.checkpoint.config.tie_word_embeddings
        self._load_module(head, self._name_of(self._model.get_input_embeddings() if tied else head))
        # What the layers are given matters to nobody: one row is table enough for any ids.
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        embedding.weight = nn.Parameter(torch.zeros_like(head.weight[:1]), requires_grad=False)
        total, count = 0.0, 0
        for hidden, ids in zip(self.hidden, self.batches, strict=True):
            for states_bTD, targets_bT in _spans(hidden[:, :-1], ids[:, 1:].to(self.device)):
                logits_NV = self._logits(states_bTD).flatten(0, 1).float()
                total += float(functional.cross_entropy(logits_NV, targets_bT.flatten(), reduction="sum").double())
                count += targets_bT.numel()
        for module in (*modules, embedding, head):
            _release(module)
        return Mean(total, count)

    def _logits(self, states_bTD: Tensor) -> Tensor:
        """Return what the model makes of the states after its last layer, (b, T, V): its own norm, head and scale."""
        with _answered(self._layers(), states_bTD):
            ids = torch.zeros(states_bTD.shape[:2], dtype=torch.int64, device=self.device)
            return self._model(input_ids=ids, use_cache=False).logits

    def probe(self) -> np.ndarray:
        """Return the states (T', D) of the first tokens of the first block, in float32."""
        return self.hidden[0][0, :PROBED_TOKENS].float().cpu().numpy()

    def probed_ids(self) -> np.ndarray:
        """Return the ids (T',) of the tokens that `probe` shows."""
        return self.batches[0][0, :PROBED_TOKENS].numpy()

    def close(self) -> None:
        """Give everything back now: modules refer to each other in circles, which Python frees when it likes."""
        self._unload()
        self._reader.close()
        self.hidden, self._branch_outputs, self._entered = [], [], None

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors of the layer that is being passed, in the precision that it computes in."""
        return dict(self._load(layer).named_parameters())

    def _begin(self, branch: Branch) -> tuple[Any, Any]:
        """Return what sums the observations of a branch, and what holds what they are of."""
        if branch.reading.experts is None:
            return ObservationSum(), self.store()
        return RoutedSum(self.checkpoint.family.num_experts(self.checkpoint.config)), RoutedStates(self.store)

    def _run(self, layer: int, branch: Branch) -> Iterator[tuple[Tensor, Any]]:
        """Run a branch up to its output projection; yield its input (b, T, D), and X (b, T, P), or `Routed`."""
        run = self.run_branch if branch.reading.experts is None else self.run_experts
        for hidden in self.entering(layer, branch):
            normalised = self.normalise(layer, branch, hidden)
            yield normalised, run(layer, branch, normalised)

    def _projected(self, layer: int, branch: Branch, decision: Decision | None) -> Callable[[Any], Tensor]:
        """Return what maps the input (b, T, P) of a branch's output projection to its output, dense or as decided."""
        if branch.reading.experts is not None:
            return self._projected_experts(layer, branch, decision)
        projection = self.projection(layer, branch)
        weight_DS: Tensor = projection.weight
        bias_D: Tensor | None = projection.bias
        kept_S: Tensor | slice = slice(None)
        if decision is not None:
            weight_DS, bias_D = recovered_projection(weight_DS, bias_D, decision)
            kept_S = decision.kept_rows(projection.weight.shape[1]).to(self.device)
        return lambda x_bTP: functional.linear(x_bTP[..., kept_S], weight_DS, bias_D)

    def _projected_experts(self, layer: int, branch: Branch, decision: Decision | None) -> Callable[[Routed], Tensor]:
        weight_EDS: Tensor = self._load(layer).get_parameter(branch.output)
        kept_ES: Tensor | None = None
        if decision is not None:
            weight_EDS, kept_ES = recovered_experts(weight_EDS, decision)
        return lambda routed: project(routed, weight_EDS, kept_ES)

    def _add(self, index: int, added: Tensor) -> Mean:
        """Add what a branch adds to a batch's states; return their squared norm, summed over tokens."""
        hidden = self.hidden[index] + added
        self.hidden[index] = hidden
        return _summed_power(hidden)

    def _embed(self) -> States:
        """Return the input of the first layer, and note how the model calls each of its layers."""
        table_VD = self._load_embeddings()
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        hidden = self.store()
        with torch.inference_mode(), _recorded(self._layers()) as calls:
            for ids in self.batches:
                # The table stays as it is stored; the rows of this batch alone take the precision of the layers.
                used, positions = ids.unique(return_inverse=True)
                embedding.weight = nn.Parameter(self._place(table_VD[used]), requires_grad=False)
                positions = positions.to(self.device)
                if not self._calls:
                    # One block's masks and rotary tables serve batches of any number of blocks of that length.
                    self._model.base_model(input_ids=positions[:1], use_cache=False)
                    self._calls = [call for _, call in calls]
                calls.clear()
                self._model.base_model(input_ids=positions, use_cache=False)
                hidden.append(calls[0][0])
        for name in self.checkpoint.outside():
            _release(self._model.get_submodule(name))
        return hidden

    def _load_embeddings(self) -> Tensor:
        """Load what is outside the layers, but for the head; return the table of embeddings (V, D), as stored."""
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        # The id that it names need not be among the rows of a batch; it matters to gradients alone.
        embedding.padding_idx = None
        self._load_outside()
        return self.checkpoint.read_module(self._name_of(embedding))["weight"]

    def _load_outside(self) -> list[nn.Module]:
        """Load what is outside the layers, but for embeddings and head: norms, tables of positions."""
        apart = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        loaded = []
        for name in self.checkpoint.outside():
            module = self._model.get_submodule(name)
            if module not in apart:
                self._load_module(module, name)
                loaded.append(module)
        return loaded

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, one in self._model.named_modules() if one is module)

    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self._model.get_submodule(self.checkpoint.family.layers))

    def _load(self, layer: int) -> nn.Module:
        """Return a layer with its weights; the layer before gives its memory back."""
        module = self._layers()[layer]
        if self._layer != layer:
            self._unload()
            _assign(module, self._reader.read(layer))
            self._layer = layer
        return module

    def _unload(self) -> None:
        if self._layer is not None:
            _release(self._layers()[self._layer])
        self._layer = None

    def _load_module(self, module: nn.Module, name: str) -> None:
        """Load a module outside the layers with the tensors of that name."""
        tensors = self.checkpoint.read_module(name)
        _assign(module, {key: self._place(tensor) for key, tensor in tensors.items()})

    def _place(self, tensor: Tensor) -> Tensor:
        """Bring a tensor to where it computes, in the precision that it computes in."""
        return tensor.to(self.device, self.dtype)

    def require_finite(self, observed: Seen, layer: int, branch: Branch) -> Seen:
        """Return an observation in which nothing is NaN or infinite.

        Raises:
            NonFiniteError: something is; the message names the layer and module.
        """
        if not observed.is_finite():
            self._raise_non_finite(layer, branch.described)
        return observed

    def _raise_non_finite(self, layer: int, part: str) -> None:
        raise NonFiniteError(
            f"layer {layer}: the activations of {part} hold NaN or infinity: "
            f"the weights of {self.checkpoint.directory} overflow {self.dtype}, or are damaged"
        )


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that layers compute in: float32 on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module its weights, which fit it: a checkpoint that was opened is of its config's shapes."""
    # Old checkpoints also store tables (`rotary_emb.inv_freq`) that the model now computes.
    module.load_state_dict({name: tensors[name] for name in module.state_dict()}, assign=True)


def _release(module: nn.Module) -> None:
    """Give the memory of a module's weights back; buffers, which the model computed, stay."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def _build_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model without weights; buffers such as rotary tables are real."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Let every layer note its input and keyword arguments, and pass the input on unchanged."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(hidden: Tensor, **call: Any) -> Tensor:
        calls.append((hidden, call))
        return hidden

    for layer in layers:
        layer.forward = record
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _answered(layers: nn.ModuleList, states: Tensor) -> Iterator[None]:
    """Let the last layer return states of its own, and the others what they are given."""

    def answer(hidden: Tensor, **call: Any) -> Tensor:
        return states

    with _recorded(layers):
        layers[-1].forward = answer
        yield


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Let a module return the input of one of its parts, the last that it runs."""
    part = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, part)


def _spans(states_BTD: Tensor, targets_BT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut states and targets into parts of no more tokens than logits are computed of at once."""
    blocks = max(1, LOGIT_TOKENS // states_BTD.shape[1])
    for states_bTD, targets_bT in zip(states_BTD.split(blocks), targets_BT.split(blocks), strict=True):
        yield from zip(states_bTD.split(LOGIT_TOKENS, dim=1), targets_bT.split(LOGIT_TOKENS, dim=1), strict=True)


def _power(states: Tensor) -> float:
    """Return the squared norm of states (..., D), summed over tokens."""
    return float(states.float().square().sum(dim=-1).double().sum())


def _summed_power(states_bTD: Tensor) -> Mean:
    """Return the squared norm of a batch's states."""
    return Mean(_power(states_bTD), states_bTD.shape[0] * states_bTD.shape[1])


def _finite(value: float) -> bool:
    return value - value == 0
