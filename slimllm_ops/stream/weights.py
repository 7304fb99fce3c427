"""Loads a model's weights one layer at a time, and frees them; no other module does either.

The model is built without weights, so that its own code runs: its masks, rotary tables and modules. A layer's weights
are loaded when the layer is first used, and freed when another layer is. Only `whole` can keep them all.

Weights and the arguments of layers are made outside inference mode: its tensors cannot be saved for a backward pass.

Shapes: b blocks in a batch, T tokens in a block, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimllm_ops.checkpoint.layer_reader import LayerReader
from slimllm_ops.checkpoint.reading import Checkpoint
from slimllm_ops.models.skeleton import build_skeleton


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that layers compute in: float32 on a CPU, bfloat16 on a GPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class ModelWeights:
    """A model with the weights of one layer at a time.

    Args:
        checkpoint: The model.
        device: Where the layers run.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.dtype = compute_dtype(device)
        self._model = build_skeleton(checkpoint.config).requires_grad_(False)
        self._reader = LayerReader(checkpoint, self._place)
        self._calls: list[dict[str, Any]] = []
        self._loaded: int | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, with or without weights."""
        return cast(nn.ModuleList, self._model.get_submodule(self.checkpoint.family.layers))

    @torch.inference_mode(mode=False)
    def load(self, layer: int) -> nn.Module:
        """Return a layer with its weights, and free those of the layer before."""
        module = self.layers[layer]
        if self._loaded != layer:
            self._release_layer()
            _assign(module, self._reader.read(layer))
            self._loaded = layer
        return module

    def call(self, layer: int) -> dict[str, Any]:
        """Return the keyword arguments that the model gives a layer: masks and rotary tables, recorded by `embed`."""
        return self._calls[layer]

    @torch.inference_mode(mode=False)
    def embed(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the first layer's input for each batch of ids (b, T), and record how the model calls each layer."""
        table_VD = self._load_embeddings()
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        with _recorded(self.layers) as calls:
            for ids in batches:
                # The table keeps its stored dtype; only this batch's rows are converted to the dtype of the layers.
                used, positions = ids.unique(return_inverse=True)
                embedding.weight = nn.Parameter(self._place(table_VD[used]), requires_grad=False)
                positions = positions.to(self.device)
                if not self._calls:
                    # Masks and rotary tables of one block work for any number of blocks of that length.
                    self._model.base_model(input_ids=positions[:1], use_cache=False)
                    self._calls = [call for _, call in calls]
                calls.clear()
                self._model.base_model(input_ids=positions, use_cache=False)
                yield calls[0][0]
        for name in self.checkpoint.outside():
            _release(self._model.get_submodule(name))

    @contextmanager
    def head(self) -> Iterator[None]:
        """Load what `logits` needs after the layers, and free it at the end."""
        self._release_layer()
        modules = self._load_outside()
        head = self._model.get_output_embeddings()
        tied = self.checkpoint.config.tie_word_embeddings
        self._load_module(head, self._name_of(self._model.get_input_embeddings() if tied else head))
        # `logits` replaces what the layers return, so any ids will do, and a table of one row is enough.
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        embedding.weight = nn.Parameter(torch.zeros_like(head.weight[:1]), requires_grad=False)
        try:
            yield
        finally:
            for module in (*modules, embedding, head):
                _release(module)

    def logits(self, states_bTD: Tensor) -> Tensor:
        """Return the logits (b, T, V) of states after the last layer, from the model's own norm, head and scale."""
        with _answered(self.layers, states_bTD):
            ids = torch.zeros(states_bTD.shape[:2], dtype=torch.int64, device=self.device)
            return self._model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def whole(self, *, keep_layers: bool) -> Iterator[PreTrainedModel]:
        """Yield the model with everything that it runs, and free all of it at the end.

        Args:
            keep_layers: Whether all layers stay in memory. Otherwise each is read when it runs, every time.
        """
        self._release_layer()
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        outside = [*self._load_outside(), embedding, head]
        self._load_module(embedding, self._name_of(embedding))
        if self.checkpoint.config.tie_word_embeddings:
            head.weight = embedding.weight
        else:
            self._load_module(head, self._name_of(head))
        if keep_layers:
            for number, layer in enumerate(self.layers):
                _assign(layer, self._reader.read(number))
        try:
            with nullcontext() if keep_layers else _read_when_run(self.layers, self.load):
                yield self._model
        finally:
            for module in (*outside, *self.layers):
                _release(module)

    def close(self) -> None:
        """Free all memory now; modules refer to each other in cycles, which Python would free at some later time."""
        self._release_layer()
        self._reader.close()

    def _release_layer(self) -> None:
        if self._loaded is not None:
            _release(self.layers[self._loaded])
        self._loaded = None

    def _load_embeddings(self) -> Tensor:
        """Load what is outside the layers, except the head; return the embedding table (V, D) in its stored dtype."""
        embedding = cast(nn.Embedding, self._model.get_input_embeddings())
        # The padding id may be missing from a batch's rows, and only gradients depend on it.
        embedding.padding_idx = None
        self._load_outside()
        return self.checkpoint.read_module(self._name_of(embedding))["weight"]

    def _load_outside(self) -> list[nn.Module]:
        """Load what is outside the layers, except embeddings and head: norms and position tables."""
        apart = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        loaded = []
        for name in self.checkpoint.outside():
            module = self._model.get_submodule(name)
            if module not in apart:
                self._load_module(module, name)
                loaded.append(module)
        return loaded

    def _load_module(self, module: nn.Module, name: str) -> None:
        """Load a module outside the layers from the tensors stored under its name."""
        tensors = self.checkpoint.read_module(name)
        _assign(module, {key: self._place(tensor) for key, tensor in tensors.items()})

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, one in self._model.named_modules() if one is module)

    def _place(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device, in the dtype that layers compute in."""
        return tensor.to(self.device, self.dtype)


def _assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module its weights; they fit, since an open checkpoint has the shapes of its config."""
    # Old checkpoints also store tables (`rotary_emb.inv_freq`) that the model now computes.
    module.load_state_dict({name: tensors[name] for name in module.state_dict()}, assign=True)


def _release(module: nn.Module) -> None:
    """Free a module's weights; keep its buffers, which the model computed."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


@contextmanager
def _read_when_run(layers: nn.ModuleList, load: Callable[[int], nn.Module]) -> Iterator[None]:
    """Make every layer load its weights before it runs."""

    def run(number: int, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        load(number)
        return forward(*arguments, **named)

    for number, layer in enumerate(layers):
        layer.forward = partial(run, number, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Make every layer record its input and keyword arguments, and return its input unchanged."""
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
    """Make the last layer return the given states, and the others their input."""

    def answer(hidden: Tensor, **call: Any) -> Tensor:
        return states

    with _recorded(layers):
        layers[-1].forward = answer
        yield
