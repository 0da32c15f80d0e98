"""Training steps on a GPU that does not exist, and every place where the host would have waited for it.

``python -m tests.models.meta_gpu`` runs whole steps of small models (forward, loss, backward, reduction, clipping,
AdamW, metrics) on the meta device, which is taken for a CUDA device: PyTorch works out shapes and computes nothing.
What needs a number from the device is noted down and answered with a made-up number. Prints JSON: one object a case.

Noted are reads of single numbers (``item``, ``float``, ``if tensor``), copies from the device, copies to it that wait
(not ``non_blocking``, ``torch.tensor(list, device=...)``), and operations whose result has a size that depends on data
(``nonzero``, boolean indices, ``masked_select``, ``unique``, ``repeat_interleave``).

Not here: attention, which has no kernel for the meta device; a sum of its inputs takes its place. Collectives return
at once.
"""

from __future__ import annotations

from tests.te import fake_cuda

fake_cuda.install()  # before anything asks for CUDA

import sys  # noqa: E402
from importlib.machinery import ModuleSpec  # noqa: E402
from types import ModuleType, SimpleNamespace  # noqa: E402

for _name in ("deep_ep", "deep_ep.utils"):  # before Megatron-Core looks for it; nothing is sent through it
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].__spec__ = ModuleSpec(_name, None)
for _name in ("transformer_engine", "apex"):  # their kernels know no meta tensors
    sys.modules[_name] = None  # type: ignore[assignment]
_buffer = SimpleNamespace(set_num_sms=lambda number: None)
sys.modules["deep_ep"].__dict__.update(Buffer=_buffer, HybridEPBuffer=_buffer)
sys.modules["deep_ep.utils"].__dict__.update(EventHandle=None, EventOverlap=None)

import collections  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import json  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from llada_mega.config.model import ModelConfig  # noqa: E402
from llada_mega.config.training import OptimizerConfig  # noqa: E402
from llada_mega.data.batch import Batch, build_batch  # noqa: E402
from llada_mega.data.sample import Sample  # noqa: E402
from llada_mega.diffusion.objectives import DiffusionObjective  # noqa: E402
from llada_mega.diffusion.schedule import LinearSchedule  # noqa: E402
from llada_mega.models import attention, build_model  # noqa: E402
from llada_mega.models.router import routers  # noqa: E402
from llada_mega.parallel import cpu_runtime, destroy, groups, initialize  # noqa: E402
from llada_mega.training.optimizer import build_optimizer, wrap_data_parallel  # noqa: E402
from llada_mega.training.step import TrainStep  # noqa: E402
from tests.models.helpers import dense_config, moe_config  # noqa: E402
from tests.models.meta_gpu_cases import CASES, MICRO_BATCHES, Case  # noqa: E402

aten = torch.ops.aten
META = torch.device("meta")
LENGTH, TOP_K = 64, 4
SIZED_BY_DATA = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.equal.default: "equal",
}


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, by kind and place.

    Attributes:
        found: how often, by "kind at file:function".
        routes: what copies from the device of counts of routes add up to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.routes = 0

    def see_routes(self, router: torch.nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """The number of routes of the layer that is about to run; the router's output ends with the map [T, E]."""
        self.routes = len(output[1]) * TOP_K

    def note(self, kind: str) -> None:
        """One more at the innermost function that is not PyTorch's."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        frame = next(
            (frame for frame in reversed(frames) if frame.filename not in (__file__, fake_cuda.__file__)), frames[-1]
        )
        file = frame.filename.rpartition("/site-packages/")[2].rpartition("/llada_mega/")
        self.found[f"{kind} at {file[1].lstrip('/')}{file[2]}:{frame.name}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_device = any(value.is_meta for value in args if isinstance(value, Tensor))
        if func is aten._local_scalar_dense.default and on_device:
            self.note("item")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            to, waits = torch.device(kwargs["device"]), not kwargs.get("non_blocking", False)
            if on_device and to.type == "cpu":
                self.note("copy from the device")  # one that does not wait is waited for before its use
                return self._numbers(args[0], kwargs.get("dtype") or args[0].dtype)
            if not on_device and to.type == "meta" and waits:
                self.note("copy to the device")
        if func is aten.copy_.default and args[0].is_meta != args[1].is_meta and not (len(args) > 2 and args[2]):
            self.note("copy")
        if on_device and func in SIZED_BY_DATA and kwargs.get("output_size") is None:
            self.note(SIZED_BY_DATA[func])
        if on_device and func is aten.masked_select.default:  # Megatron's permutation: the routes of the experts here
            return args[0].new_empty(args[1].numel() // moe_config().moe.num_experts * TOP_K)
        if func is aten.index.Tensor and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.note("boolean index")
        return func(*args, **kwargs)

    def _numbers(self, source: Tensor, dtype: torch.dtype) -> Tensor:
        """Counts that add up, as if every expert and rank had as many routes."""
        return torch.full(source.shape, self.routes // max(source.numel(), 1), dtype=dtype)


class SeesNumbers(TorchFunctionMode):
    """Notes numbers that are copied from the host: PyTorch does that where no dispatch mode sees it."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            device = kwargs.get("device") or (args[0].device if func is Tensor.new_tensor else "cpu")
            if torch.device(device).type != "cpu":
                self.waits.note("copy of numbers to the device")
        return func(*args, **kwargs)


@contextlib.contextmanager
def _gpu(waits: Waits, world_size: int) -> Iterator[None]:
    with fake_cuda.world(0, world_size), SeesNumbers(waits):
        yield


def pretend() -> None:
    """What ``fake_cuda`` leaves out because building a model does not need it."""
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.Stream, torch.cuda.current_stream = _Stream, lambda device=None: _Stream()
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # asks the driver
        setattr(torch.optim.Optimizer, name, lambda self: None)
    torch.Tensor.is_cuda = property(lambda self: self.is_meta)  # type: ignore[assignment]
    original = torch.Tensor.type

    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:  # optimizers sort parameters by it
        return original(self, *args, **kwargs) if args or kwargs else cpu_runtime._CUDA_TYPE_NAMES.get(self.dtype)

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    groups._device = lambda: META
    attention.interval_attention = _attention

    @contextlib.contextmanager
    def one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:  # coalesced collectives know no meta tensors
        yield fake_cuda._Nothing()

    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = one_by_one


class _Stream(fake_cuda._Nothing):
    def record_event(self, event: Any = None) -> Any:
        return fake_cuda._Nothing()


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Tensor:
    seen = (key + value).mean(dim=1, keepdim=True)  # there may be fewer queries than keys
    return query + seen.repeat_interleave(query.shape[2] // key.shape[2], dim=2)


def model_config(kind: str) -> ModelConfig:
    """A small model whose experts can be grouped in bf16."""
    config = moe_config() if kind == "moe" else dense_config()
    if kind == "moe":
        config.moe = dataclasses.replace(config.moe, expert_ffn_hidden_size=32, top_k=TOP_K)
    return dataclasses.replace(config, implementation="local", attention_backend="reference", mask_token_id=3)


def batches(config: ModelConfig) -> list[Batch]:
    """One sample a micro-batch."""
    generator = torch.Generator().manual_seed(0)
    schedule = LinearSchedule()
    return [
        build_batch(
            [
                Sample(
                    torch.randint(4, config.vocab_size, (LENGTH,), generator=generator),
                    [LENGTH],
                    [False],
                    torch.ones(LENGTH, dtype=torch.bool),
                    sample_index=index,
                )
            ],
            layout="bdlm",
            block_size=8,
            objective=DiffusionObjective("elbo", schedule),
            schedule=schedule,
            seed=1,
            mask_token_id=3,
            pad_token_id=0,
        )
        for index in range(MICRO_BATCHES)
    ]


def run(case: Case) -> dict[str, Any]:
    """The waits of one step, and the classes that the model is made of."""
    config, waits = model_config(case.model), Waits()
    with _gpu(waits, case.world_size):
        place = initialize(case.parallel)
        try:
            with META:
                model = build_model(config, parallel=case.parallel, dtype=torch.bfloat16, seed=None, groups=place)
            dispatchers = {m.token_dispatcher for m in model.modules() if hasattr(m, "token_dispatcher")}
            managers = {type(d._comm_manager).__name__ for d in dispatchers if hasattr(d, "_comm_manager")}
            classes = {type(m).__name__ for m in (*model.modules(), *dispatchers)} | managers
            for router in routers(model):
                router.register_forward_hook(waits.see_routes)
            if not case.only_build:
                chunks = wrap_data_parallel([model], case.parallel)
                optimizer = build_optimizer(OptimizerConfig(), chunks, case.parallel, torch.bfloat16)
                step = TrainStep(chunks, optimizer, place, seed=1, device=META)
                mine = batches(config)
                waits.found.clear()
                with waits:
                    _, applied = step(mine, learning_rate=1e-4, embedding_noise_std=0.1, accept=lambda measured: True)
                assert applied
        finally:
            destroy()
    return {"waits": dict(sorted(waits.found.items())), "classes": sorted(classes)}


def probe() -> dict[str, list[str]]:
    """What is noted of code that waits, and of code that does not."""
    found = {}
    with _gpu(waits := Waits(), 1), waits:
        numbers, mask = torch.ones(3, device="cuda"), torch.ones(3, dtype=torch.bool, device="cuda")
        codes: dict[str, Callable[[], Any]] = {
            "item": lambda: numbers[0].item(),
            "float": lambda: float(numbers[0]),
            "branch": lambda: 1 if numbers[0] > 0 else 0,
            "tolist": numbers.tolist,
            "cpu": numbers.cpu,
            "to the device": lambda: torch.ones(3).to("cuda"),
            "numbers": lambda: torch.tensor([1, 2], device="cuda"),
            "copy": lambda: numbers.copy_(torch.ones(3)),
            "nonzero": mask.nonzero,
            "boolean index": lambda: numbers[mask],
            "masked_select": lambda: numbers.masked_select(mask),
            "unique": numbers.unique,
            "repeats": lambda: numbers.repeat_interleave(numbers.long()),
            "equal": lambda: torch.equal(numbers, numbers),
            "nothing": lambda: numbers.where(mask, 0.0).sum() + torch.full((), 2.0, device="cuda"),
            "asynchronous": lambda: torch.ones(3).to("cuda", non_blocking=True),
        }
        for name, code in codes.items():
            waits.found.clear()
            with contextlib.suppress(NotImplementedError, RuntimeError):  # PyTorch does not know the size either
                code()
            found[name] = [wait.partition(" at ")[0] for wait in waits.found]
    return found


def main() -> int:
    """Print what was found."""
    pretend()
    print(json.dumps({"probes": probe(), "steps": {name: run(case) for name, case in CASES.items()}}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
