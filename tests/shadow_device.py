# ruff: noqa
"""A pretend accelerator with real values, for device-mismatch tests on CPU-only machines.
Inside `with ShadowDevice('cuda') as dev:` tensors made with device='cuda' hold CPU data but
are a separate type; ops mixing them with plain CPU tensors raise DeviceMismatch."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten, tree_map


class DeviceMismatch(RuntimeError):
    pass


_REAL = torch.device("meta")  # C++ device of the wrapper: has a guard in every build
aten = torch.ops.aten
# (op, what may legally sit on the CPU beside device tensors)
_COPY = {aten.copy_.default, aten._to_copy.default}
_INDEX = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
# CUDA kernels that (unlike TensorIterator pointwise ops) refuse even 0-dim CPU operands
_STRICT0 = (
    "gather",
    "scatter",
    "index_select",
    "searchsorted",
    "bucketize",
    "mm",
    "bmm",
    "addmm",
    "linalg",
    "sort",
    "topk",
    "embedding",
)


class Shadow(torch.Tensor):
    @staticmethod
    def __new__(cls, elem, requires_grad=False):
        r = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=_REAL,
            requires_grad=requires_grad,
        )
        r._elem = elem
        return r

    def __repr__(self):
        return f"Shadow({self._elem!r})"

    @property
    def device(self):
        return torch.device("cuda", 0)

    @property
    def is_cuda(self):
        return True

    @property
    def is_meta(self):
        return False

    @property
    def is_cpu(self):
        return False

    def get_device(self):
        return 0

    def cpu(self, *a, **k):
        return self.to("cpu")

    def numpy(self, *a, **k):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *a, **k):
        return self.numpy()

    def tolist(self):
        Stats.syncs += 1
        return self._elem.detach().tolist()

    def __format__(self, spec):
        return format(self._elem.item(), spec) if self.dim() == 0 else repr(self)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Stats:
    syncs = 0
    ops = 0


SYNC = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
}


def _run(func, args, kwargs):
    flat, spec = tree_flatten((args, kwargs))
    ts = [a for a in flat if isinstance(a, torch.Tensor)]
    has = any(isinstance(t, Shadow) for t in ts)
    cpu = [t for t in ts if not isinstance(t, Shadow)]
    if any(t.is_meta for t in cpu):
        raise AssertionError(f"real meta tensor in {func}")
    tgt = kwargs.get("device")
    to_dev = tgt is not None and torch.device(tgt).type == "meta"
    gen = kwargs.get("generator") or next((a for a in flat if isinstance(a, torch.Generator)), None)
    if gen is not None and gen.device.type == "cpu" and (to_dev or has):
        raise DeviceMismatch(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    if has:
        Stats.ops += 1
    if has and cpu and func not in _COPY:
        name = func.overloadpacket.__name__
        if func in _INDEX:
            bad = not isinstance(args[0], Shadow) or (
                len(args) > 2 and not isinstance(args[2], Shadow) and args[2].dim() > 0
            )
        else:
            strict = any(s in name for s in _STRICT0)
            bad = (
                strict
                or any(t.dim() > 0 for t in cpu)
                or (name.endswith("_") and not isinstance(args[0], Shadow))
            )
        if bad:
            raise DeviceMismatch(
                f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu"
            )
    if has and func in SYNC:
        Stats.syncs += 1
    un = lambda t: t._elem if isinstance(t, Shadow) else t
    a2, k2 = tree_unflatten([un(a) for a in flat], spec)
    out_dev = has
    if "device" in k2 and k2["device"] is not None:
        out_dev = to_dev
        k2 = {**k2, "device": torch.device("cpu")}
    if func in _COPY and func is aten.copy_.default:
        out_dev = isinstance(args[0], Shadow)
    if k2.get("pin_memory"):
        k2["pin_memory"] = False
    out = func(*a2, **k2)
    ident = {id(un(t)): t for t in ts}

    def wrap(o):
        if not isinstance(o, torch.Tensor):
            return o
        if id(o) in ident:  # in-place / out=
            t = ident[id(o)]
            if isinstance(t, Shadow) and t.size() != o.size():
                raise AssertionError("resize of a shadow tensor")
            return t
        return Shadow(o) if out_dev else o

    return tree_map(wrap, out)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _is_dev(x):
    return (isinstance(x, torch.device) and x.type == "cuda") or (
        isinstance(x, str) and x.split(":")[0] == "cuda"
    )


class _Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (
            func == torch.Tensor.data.__set__
            and isinstance(args[0], Shadow)
            and isinstance(args[1], Shadow)
        ):
            if args[0].shape != args[1].shape or args[0].dtype != args[1].dtype:
                raise AssertionError("x.data = other shape/dtype: not covered")
            args[0]._elem = args[1]._elem.detach()
            return None
        if func is torch.Tensor.cuda:
            return args[0].to(_REAL)
        sub = lambda x: _REAL if _is_dev(x) else x
        if _is_dev(kwargs.get("device")):
            kwargs["device"] = _REAL
        if func is torch.Tensor.to:
            args = tuple(sub(a) for a in args)
            if len(args) > 1 and isinstance(args[1], Shadow):  # x.to(other)
                args = (args[0], _REAL, args[1].dtype) + args[2:]
        if func is torch.tensor and kwargs.get("device") == _REAL:  # torch.tensor(data, device=)
            kwargs["device"] = "cpu"
            return func(*args, **kwargs).to(_REAL)
        if func is torch.as_tensor and kwargs.get("device") == _REAL:
            kwargs["device"] = "cpu"
            return func(*args, **kwargs).to(_REAL)
        return func(*args, **kwargs)


class ShadowDevice:
    def __init__(self, name="cuda"):
        self.device = torch.device(name)

    def __enter__(self):
        self.d, self.f = _Dispatch(), _Function()
        self.d.__enter__()
        self.f.__enter__()
        Stats.syncs = Stats.ops = 0
        return self.device

    def __exit__(self, *e):
        self.f.__exit__(*e)
        self.d.__exit__(*e)
