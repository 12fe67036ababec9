"""Random cases of window attention, the formula read literally, and errors measured against float64."""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

import swin_moe.ops.attention.fused  # noqa: F401  defines the operator
from swin_moe.ops.attention.reference import AttentionNumbers, attend_map

INPUTS = ("qkv", "bias_table", "logit_scale", "pad_qkv")
# Added to the bound on the relative error of one case: a few roundings, where eager happens to be exact (48 float32
# results of 560 cases are beyond 1.5 times without it, most of them of few numbers). In float64 eager is the reference.
FLOORS = {torch.float64: 3e-14, torch.float32: 3e-7, torch.bfloat16: 5e-4, torch.float16: 6e-5}
MANY = 64  # numbers of a result that is held to the bound in every single case
Operator = Callable[..., Tensor]  # with the arguments of window_attention
HEAD_DIMS = (8, 9, 16, 20, 24, 32, 33, 40, 48, 63, 64)


@dataclass(frozen=True)
class Case:
    batch: int
    height: int
    width: int
    heads: int
    head_dim: int
    window: tuple[int, int]
    shift: tuple[int, int]
    cosine: bool
    pad: bool  # pad_qkv is given

    @property
    def numbers(self) -> AttentionNumbers:
        """The arguments of the operator after the tensors."""
        return AttentionNumbers(self.heads, *self.window, *self.shift, self.head_dim**-0.5, -100.0)

    def tensors(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """Returns qkv, bias_table, logit_scale, pad_qkv: values of `dtype`, tables of at least float32."""
        generator = torch.Generator().manual_seed(seed)
        dim, (h, w) = self.heads * self.head_dim, self.window
        wide = torch.promote_types(dtype, torch.float32)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        qkv = draw(self.batch, self.height, self.width, 3 * dim).to(dtype)
        table = draw((2 * h - 1) * (2 * w - 1), self.heads).to(wide)
        factor = (1 + 20 * torch.rand(self.heads, generator=generator, dtype=torch.float64)).to(wide)
        pad = draw(3 * dim).to(dtype)
        return [qkv, table, factor if self.cosine else None, pad if self.pad else None]


def random_case(number: int) -> Case:
    """Returns a case that is a function of its number; every fourth has one window, every fifth no shift."""
    draw = random.Random(number)
    window = (draw.randint(1, 9), draw.randint(1, 9)) if number % 3 else (draw.choice((4, 7, 8, 12)),) * 2
    rows, columns = (1, 1) if number % 4 == 0 else (draw.randint(1, 3), draw.randint(1, 3))
    height, width = (n * w - (draw.randrange(w) if number % 2 else 0) for n, w in zip((rows, columns), window))
    shift = (0, 0) if number % 5 == 0 else (draw.randrange(window[0]), draw.randrange(window[1]))
    return Case(
        draw.randint(1, 2),
        height,
        width,
        draw.randint(1, 3),
        draw.choice(HEAD_DIMS),
        window,
        shift,
        cosine=draw.random() < 0.5,
        pad=draw.random() < 0.6,
    )


def formula(case: Case, qkv: Tensor, table: Tensor, factor: Tensor | None, pad: Tensor | None) -> Tensor:
    """Returns the output token by token, from where each one lies before the shift; no roll, no partition."""
    (h, w), (shift_h, shift_w), dim = case.window, case.shift, case.heads * case.head_dim
    rows, columns = -(-case.height // h), -(-case.width // w)
    zero = qkv.new_zeros(3 * dim) if pad is None else pad
    images = []
    for image in qkv:
        out = {}
        for window in range(rows * columns):
            tokens = []  # (y, x in the padded map, place in the window, wrapped around each way)
            for y in range(h):
                for x in range(w):
                    down, right = window // columns * h + y + shift_h, window % columns * w + x + shift_w
                    wrapped = (down >= rows * h, right >= columns * w)
                    tokens.append((down % (rows * h), right % (columns * w), y, x, wrapped))
            inside = [y < case.height and x < case.width for y, x, *_ in tokens]
            values = torch.stack([image[t[0], t[1]] if i else zero for t, i in zip(tokens, inside)])
            q, k, v = values.view(h * w, 3, case.heads, case.head_dim).unbind(1)
            bias_row = torch.tensor(
                [[(a[2] - b[2] + h - 1) * (2 * w - 1) + a[3] - b[3] + w - 1 for b in tokens] for a in tokens]
            )
            seam = torch.tensor([[-100.0 * (a[4] != b[4]) for b in tokens] for a in tokens], dtype=qkv.dtype)
            heads = []
            for head in range(case.heads):
                a, b = q[:, head], k[:, head]
                if factor is None:
                    scores = a @ b.T * case.head_dim**-0.5
                else:
                    a, b = (t / t.norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (a, b))
                    scores = a @ b.T * factor[head]
                heads.append((scores + table[:, head][bias_row] + seam).softmax(-1) @ v[:, head])
            for token, i, value in zip(tokens, inside, torch.cat(heads, dim=1)):
                if i:
                    out[token[:2]] = value
        images.append(torch.stack([out[y, x] for y in range(case.height) for x in range(case.width)]))
    return torch.stack(images).view(case.batch, case.height, case.width, dim)


def value_and_gradients(attend, tensors: list[Tensor | None], grad_out: Tensor) -> dict[str, Tensor]:
    """Returns the output and the gradient of every tensor given, by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = attend(*leaves)
    given = {name: leaf for name, leaf in zip(INPUTS, leaves) if leaf is not None}
    grads = torch.autograd.grad(out, list(given.values()), grad_out.to(out.dtype), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(given, grads))}


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Returns |found - exact| / |exact|, Euclidean lengths in float64; exact zeros are compared as they are."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def errors(
    case: Case, dtype: torch.dtype, seed: int = 0, *, operator: Operator | None = None
) -> dict[str, tuple[float, float, int]]:
    """Returns per result (error of the operator, of the eager reference, numbers it has): relative, against float64.

    operator: What takes the operator's place; None = the operator on the CPU.

    A result that is zero but for rounding (softmax over one token) is compared with what rounding leaves in eager.
    """
    tensors = case.tensors(seed, dtype)
    shape = (case.batch, case.height, case.width, case.heads * case.head_dim)
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    wide = [None if t is None else t.double() for t in tensors]
    exact = value_and_gradients(lambda *t: attend_map(*t, numbers=case.numbers), wide, grad_out.double())
    eager = value_and_gradients(lambda *t: attend_map(*t, numbers=case.numbers), tensors, grad_out)
    operator = operator or torch.ops.swin_moe.window_attention
    ours = value_and_gradients(lambda *t: operator(*t, *case.numbers), tensors, grad_out)
    found = {}
    for name, expected in exact.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == expected.shape, (case, name)
        if expected.norm() < 1e-9 * exact["out"].norm():
            assert ours[name].double().norm() <= max(1e-3, 2 * eager[name].double().norm()), (case, name)
        else:
            errors = relative_error(ours[name], expected), relative_error(eager[name], expected)
            found[name] = (*errors, expected.numel())
    return found


def check_against_eager(
    numbers: Iterable[int], dtype: torch.dtype, *, operator: Operator | None = None, many: int = MANY
) -> None:
    """Asserts that the operator's errors over random cases are at most 1.5 times those of eager.

    Over all cases together (root mean square), and in every case for results of many numbers, with a floor. A few
    numbers, as the gradient of a factor per head, are sums that cancel, and eager is exact by luck now and then.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for number in numbers:
        case = random_case(number)
        for name, (ours, eager, size) in errors(case, dtype, number, operator=operator).items():
            found.setdefault(name, []).append((ours, eager))
            bound = 1.5 * eager + FLOORS[dtype]
            assert size < many or ours <= bound, f"{number}: {case}: {name}: {ours:.3g} > {bound:.3g}"
    for name, pairs in found.items():
        ours, eager = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        bound = 1.5 * eager + (FLOORS[dtype] if dtype == torch.float64 else 0.0)
        assert ours <= bound, f"{name} of {len(pairs)} cases: {ours:.3g} > {bound:.3g}"
