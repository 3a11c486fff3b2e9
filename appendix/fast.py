"""What makes a model faster without changing what it computes. Everything here is put onto a model
from outside; loopus.py knows nothing of it.

split_single_token_products   a CPU's threads share the products of one token (decoding)
require_compiler              can --compile work here?
compile_decoding              torch.compile for the passes of one token a row
compile_layers                torch.compile for training
checkpoint_activations        less memory in training: activations are made again for the gradient
"""

import copy
import functools
import itertools
import math
import weakref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from appendix.errors import InputError, first_line, require
from loopus import ADDED, Cache

PARTS = 16  # into which a product is split: enough for the threads of a small machine


class SplitLinear(nn.Linear):
    """nn.Linear that computes the product of a single token in parts.

    A CPU's library may use only one thread for a matrix times one vector (docs/speed.md). A batch
    of products, each with a part of the outputs, is shared by all threads. Compiled, a sum of
    products becomes one loop over all threads.
    """

    def forward(self, x):
        single = x.is_cpu and x.numel() == self.in_features
        if single and torch.compiler.is_compiling():
            return (x * self.weight).sum(-1).view(*x.shape[:-1], -1)
        if single and x.dtype == torch.float32:
            parts = math.gcd(self.out_features, PARTS)
            weight = self.weight.view(parts, -1, self.in_features)
            y = torch.bmm(x.expand(parts, 1, -1), weight.mT)  # (parts, 1, out / parts)
            return y.view(*x.shape[:-1], -1)
        return super().forward(x)


def split_single_token_products(model):
    """Let the backbone's linear layers compute single tokens in parts, on a CPU in fp32."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.startswith(ADDED):
            module.__class__ = SplitLinear  # the same parameters under the same names


class WholeCache(Cache):
    """A Cache of which every pass reads all columns, the mask hiding what is not there yet.

    CUDA graphs replay the same kernels on the same addresses, so shapes may not grow with the text.
    """

    def __init__(self, config, rows, columns, depths, like):
        super().__init__(config, rows, columns, depths, like)
        self.shape = (rows, columns, depths)
        for layer_cache in self.layer_caches():
            torch._dynamo.mark_static_address(layer_cache.keys, guard=False)
            torch._dynamo.mark_static_address(layer_cache.values, guard=False)

    def layer_caches(self):
        return list(itertools.chain(self.encoder, self.decoder, *self.loops))

    def visible(self, start, T, window):
        if T > 1:
            return super().visible(start, T, window)
        return slice(0, self.shape[1])

    def clear(self):
        """Forget all tokens. Columns that are not written yet must hold numbers: a mask makes
        their weight 0, and 0 times nan is nan."""
        for layer_cache in self.layer_caches():
            layer_cache.keys.zero_()
            layer_cache.values.zero_()


class KeptCaches:
    """Gives the WholeCache of the last text again where its shape fits, so that the graphs that
    were recorded with it are replayed: a new one would need new graphs, which are never freed."""

    def __init__(self, model):
        self.model = model
        self.cache = None
        self.user = lambda: None  # a weak reference to what was given out last

    def new_cache(self, rows, columns, depths):
        shape = (rows, -(-columns // 256) * 256, depths)  # rounded up, so that few are compiled
        if self.user() is not None:  # two texts at once: the other one is not done with it
            return self.make(*shape)
        if self.cache is None or self.cache.shape != shape:
            self.cache = None  # its memory is free before the next is made
            self.cache = self.make(*shape)
        self.cache.clear()
        given = copy.copy(self.cache)  # the same tensors
        self.user = weakref.ref(given)
        return given

    def make(self, *shape):
        return WholeCache(self.model.config, *shape, self.model.decoder.norm.weight)


def require_compiler(device):
    """InputError unless torch.compile can work on this device: asked before anything is made."""
    require(device.type in ("cpu", "cuda"), f"--compile: not built for {device}; leave it out")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # a kind of torch's own, and others by version
        raise InputError(
            f"--compile: needs a C++ compiler, and none was found ({first_line(error)}); install "
            "g++, or set CXX to one, or leave --compile out"
        ) from None


def compile_decoding(model):
    """From now on a pass of one token a row runs E, each loop and D through torch.compile.

    A loop is compiled by itself, so that early exit still saves loops. The tokens are the same (in
    bf16 but for rounding). Prompts, and loops in which some rows have stopped, run as before.
    """
    graphs = model.decoder.norm.weight.is_cuda  # captured as CUDA graphs
    options = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "size_asserts": False,
        "triton.cudagraphs": graphs,
        "cpp_wrapper": not graphs,
        "coordinate_descent_tuning": graphs,  # else a GPU's products of one token are slow
    }

    def compiled(function):
        fast = torch.compile(function, dynamic=not graphs, options=options)

        def choose(x, span, cache=None):
            if cache is None or x.shape[1] > 1 or span.live is not None:
                return function(x, span, cache)
            return fast(x, span, cache)

        return choose

    def begin(function):
        def begin_and_call(x, span, cache=None):
            torch.compiler.cudagraph_mark_step_begin()
            return function(x, span, cache)

        return begin_and_call

    model.encoder.forward = compiled(model.encoder.forward)
    model.reasoning.forward = compiled(model.reasoning.forward)
    model.decoder.last = compiled(model.decoder.last)
    if graphs:
        model.encoder.forward = begin(model.encoder.forward)
        model.new_cache = KeptCaches(model).new_cache


def compile_layers(model):
    """Compile the trained layers.

    Of what a layer keeps for the gradient the compiler may keep half, and makes the rest again, the
    cheapest first; docs/training.md has what that gives.
    """
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = 0.5
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.compile()


def checkpoint_activations(model):
    """Keep only each layer's input for the gradient, and make the rest again when it is needed."""
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )  # nothing in a layer is random
