"""Compiled decoding and training, and activations made again instead of kept."""

import functools
import torch
from torch.utils.checkpoint import checkpoint


def compile_decoding(model):
    """From now on `generate` runs a token's encoder, loops and decoder through torch.compile, a loop at a time, so that early exit
    still saves its loops: the same tokens (in bf16 but for rounding), faster, after a compilation. Prompts, and rows that others have left behind, run as before."""
    model.static = (
        model.decoder.norm.weight.is_cuda
    )  # captured as CUDA graphs, which need shapes and addresses that stay
    options = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "size_asserts": False,
        "triton.cudagraphs": model.static,
        "cpp_wrapper": not model.static,
    }

    def compiled(part, first=False):
        run = torch.compile(part, dynamic=not model.static, options=options)

        def call(x, span, cache):
            if model.static:
                for room in (room for layer in cache for room in layer):
                    torch._dynamo.mark_static_address(room, guard=False)
                if first:
                    torch.compiler.cudagraph_mark_step_begin()
            return run(x, span, cache)

        return call

    model.compiled = (
        compiled(model.encoder, first=True),
        compiled(model._loop),
        compiled(model.decoder.last),
    )


def compile_layers(model):
    """Compile the trained layers. Of what a layer keeps for the gradient the compiler may keep half and makes the rest again, the cheapest
    first; what that gives beside layers that are not compiled: docs/training.md."""
    import torch._functorch.config

    torch._functorch.config.activation_memory_budget = 0.5
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.compile()


def checkpoint_activations(model):
    """Keep only each layer's input for the gradient, and make the rest again when it is needed."""
    for layer in (*model.reasoning.layers, *model.decoder.layers):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
