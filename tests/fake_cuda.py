"""Do the paths that a GPU takes keep their tensors on one device? No GPU is needed.

    python tests/fake_cuda.py

PyTorch's fake tensors have a shape, a dtype and a device, and no numbers; one that says it is on
cuda:0 refuses to be mixed with one on the CPU, as a real one does. Two things are in the way on a
build of PyTorch without CUDA, and both are cured here. Autograd asks a device guard, which such a
build lacks: SHIM is one that does nothing, compiled with g++. And a fake tensor cannot tell its
numbers: `Numbers` makes them up, so that all rows are finite, go on, and stop in turn.

Each function of PATHS is run among fakes; a line of output for each says "ok" or what was mixed.
MIXTURES are faults, and each must be found: if one is not, this check is worth nothing.
"""

import contextlib
import ctypes
import importlib.util
import io
import itertools
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHIM = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;
static const Device first(DeviceType::CUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return first; }
  Device getDevice() const override { return first; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, first); }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, first);
  }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using CUDAHooks = Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
"""


def load_shim():
    """Compile SHIM and load it, before PyTorch asks for its CUDA hooks for the first time."""
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "shim.cpp"
        library = Path(folder) / "shim.so"
        source.write_text(SHIM)
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", str(source), "-o", str(library)]
        command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(torch_folder / "lib" / name), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_shim()

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402

# ---- a PyTorch that believes in cuda:0 -----------------------------------------------------------


class Generator(torch.Generator):
    """A generator that says it is on a device, and draws on the CPU."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.claimed = torch.device(device).type
        return self


class SameDevice(TorchFunctionMode):
    """A generator must be on the device of what it fills; it is then taken away."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        generator = kwargs.pop("generator", None)
        if generator is not None:
            filled = args[0].device if isinstance(args[0], torch.Tensor) else kwargs.get("device")
            device = torch.device(filled or "cpu").type
            claimed = getattr(generator, "claimed", "cpu")
            if claimed != device:
                raise RuntimeError(f"a generator on {claimed} for a tensor on {device}")
        return function(*args, **kwargs)


turns = itertools.count()
ANSWERS = {  # what a tensor of bool holds, by the function that asks; elsewhere True
    "think": lambda: next(turns) % 3 > 0,  # of three rows in a row one stops
    "continue_with_cache": lambda: False,  # no text has ended
    "anywhere": lambda: False,
}


def asking():
    """The innermost function of the project that is running."""
    frame = sys._getframe(1)
    while frame:
        file = Path(frame.f_code.co_filename)
        if ROOT in file.parents and file != Path(__file__) and ".venv" not in file.parts:
            return frame.f_code.co_name
        frame = frame.f_back
    return ""


class Numbers(TorchDispatchMode):
    """The numbers that are asked of fake tensors."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if operator is aten._unique2.default:  # of tiny.py: all numbers are different
            which = torch.zeros_like(args[0], dtype=torch.long)
            return args[0].flatten(), which, which.flatten()
        if operator is aten.equal.default:
            return True
        if operator not in (aten._local_scalar_dense.default, aten.item.default):
            return operator(*args, **(kwargs or {}))
        x = args[0]
        if getattr(x, "constant", None) is not None:  # a number that came from Python
            with _disable_current_modes():
                return x.constant.item()
        if x.dtype == torch.bool:
            return ANSWERS.get(asking(), lambda: True)()
        return 0.5 if x.is_floating_point() else 1


def swap_tensors(self, function, recurse=True):
    """nn.Module._apply for fakes, whose content cannot be exchanged in place."""
    for module in self.modules() if recurse else [self]:
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(function(p.detach()), p.requires_grad)
    return self


def nothing(*args, **kwargs):
    return 0


torch.Generator = Generator
nn.Module._apply = swap_tensors
torch.cuda.is_available = lambda: False  # a FakeTensorMode is to ask no driver
torch.cuda.mem_get_info = lambda device=None: (80 * 10**9, 80 * 10**9)
torch.cuda.memory_reserved = torch.cuda.memory_allocated = nothing
torch.cuda.max_memory_allocated = torch.cuda.synchronize = nothing
CUDA = torch.device("cuda", 0)

# In inference mode some functions go past the fakes.
real_inference_mode, torch.inference_mode = torch.inference_mode, torch.no_grad
import bench  # noqa: E402
import tiny  # noqa: E402
import train  # noqa: E402
import visualize  # noqa: E402
from appendix.fast import checkpoint_activations  # noqa: E402
from appendix.memory import NoInit  # noqa: E402
from appendix.optim import fp32_masters, update  # noqa: E402
from loopus import LoopUS, LoopUSConfig  # noqa: E402

torch.inference_mode = real_inference_mode

# ---- the paths -----------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def built(dtype=torch.bfloat16, model_type="llama"):
    """A model on cuda:0 as the loader leaves one: gate and head in fp32."""
    with torch.device("meta"), NoInit():
        model = LoopUS(LoopUSConfig(model_type=model_type, **SHAPE))
    model.to(dtype).to_empty(device=CUDA)
    for part in (model.reasoning.gate, model.q_head):
        part.float().to_empty(device=CUDA)
    return model.eval()


def ids(*shape):
    return torch.zeros(shape, dtype=torch.long, device=CUDA)


def on_cuda(*tensors):
    for x in tensors:
        assert x.device == CUDA, f"left on {x.device}: {tuple(x.shape)}"


def parts():
    for model_type in ("llama", "qwen3"):
        model = built(model_type=model_type)
        h = model.encode(ids(2, 7))
        h, q = model.loop(h)
        on_cuda(
            h, q, model.decode(h), model(ids(2, 7), loops=2), model.forward_pretrained(ids(2, 7))
        )


def train_two_steps(dtype, checkpointing=False, control=False):
    model = built(dtype)
    pairs = fp32_masters(model, dtype)
    masters = [master for _, master in pairs.values()]
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0, fused=True)
    if checkpointing:
        checkpoint_activations(model)
    for _ in range(2):
        if control:
            train.control_step(model, ids(2, 9), 0.5)
        else:
            train.training_step(model, ids(2, 9), 5, {0, 2, 3}, 0.5, horizon=2)
        on_cuda(*(master.grad for master in masters if master.grad is not None))
        update(pairs, optimizer, 1.0)
    on_cuda(*(x for state in optimizer.state.values() for x in state.values()))


def training():
    train_two_steps(torch.bfloat16)
    train_two_steps(torch.float32)


def training_otherwise():
    train_two_steps(torch.bfloat16, checkpointing=True)
    train_two_steps(torch.bfloat16, control=True)


def evaluating():
    rows = ids(5, 9)
    for plain in (True, False):
        train.evaluate(built(), (rows, train.next_tokens(rows)), 2, plain)


def generate(dtype=torch.bfloat16, rows=3, **options):
    model = built(dtype)
    options = {"budget": 3, "exit_threshold": 0.5, "seed": 1} | options
    for step in model.generate(ids(rows, 4), 4, **options):
        on_cuda(step.tokens, step.loops, step.confidence)


def stopping():
    for halt in ("confidence", "cdf", "convergence", "argmax", "kl", "none"):
        for kv in ("latest", "shared"):
            generate(halt=halt, kv=kv)


def prompts_of_any_length():
    for dtype in (torch.bfloat16, torch.float32):
        generate(dtype, lengths=[4, 2, 1])
        generate(dtype, window=3)
        generate(dtype, rows=1, temperature=0, eos_id=[5, 6])


def drawing():
    generate(top_k=5, top_p=0.9, temperature=0.7)
    generate(rows=1, use_cache=False)


def figures():
    model = built()
    states, _ = visualize.follow(model, ids(1, 5), 3)
    visualize.distances(states)
    visualize.pca(states)
    visualize.distances(visualize.layer_states(model, [ids(2, 5), ids(2, 5)]))
    visualize.loss_by_budget(model, ids(3, 9), 4)


def tiny_world():
    model = built(torch.float32)
    for budget, threshold in ((None, None), (2, None), (2, 0.5)):
        tiny.right(model, budget, threshold, count=2)


def timing():
    model = bench.random_model("tiny", torch.bfloat16, CUDA)
    with contextlib.redirect_stdout(io.StringIO()):
        bench.compare_contexts({"eager": model}, [4], 2, 1, CUDA)
        bench.compare_batches(model, [2], 2, 1, CUDA)


PATHS = [
    parts,
    training,
    training_otherwise,
    evaluating,
    stopping,
    prompts_of_any_length,
    drawing,
    figures,
    tiny_world,
    timing,
]

MIXTURES = [
    lambda: torch.ones(3, device=CUDA) + torch.ones(3),
    lambda: torch.ones(3, 4, device=CUDA).index_copy(0, torch.tensor([0]), torch.ones(1, 4)),
    lambda: nn.functional.embedding(torch.zeros(2).long(), torch.ones(3, 4, device=CUDA)),
    lambda: torch.ones(3, device=CUDA).exponential_(generator=Generator()),
    lambda: built().encode(torch.zeros(1, 3).long()),
]


def among_fakes(work):
    """Run work(); -> what was wrong, or None."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Numbers(), SameDevice():
            work()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).parent in (ROOT, ROOT / "appendix")]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno} " if own else ""
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return f"{where}{type(error).__name__}: {str(error).splitlines()[0]:.200}"


def main():
    missed = [i for i, mixture in enumerate(MIXTURES) if among_fakes(mixture) is None]
    assert not missed, f"MIXTURES {missed}: mixed devices and were not found"
    failed = False
    for path in PATHS:
        problem = among_fakes(path)
        print(f"{path.__name__:24} {problem or 'ok'}", flush=True)
        failed = failed or problem is not None
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
