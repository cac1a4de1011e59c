"""Patterns that two shapes and a number of ranks decide: how shards, copies and padding go wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import isqrt

from nbmerge.explaining.candidates import (
    Candidate,
    Mismatch,
    Strength,
    ceil_div,
    dim_words,
    evidence,
    fit_ranks,
    numel,
    product,
)
from nbmerge.explaining.model_patterns import is_vocabulary
from nbmerge.geometry import chunk_bounds

MOST_RANKS = 8192  # numbers of ranks that are tried
_USUAL_RANKS = 512  # and the most that are offered where the number is not known
_NODES, _NODE = 64, 8  # up to so many any number is met, beyond them whole nodes
_SMALL_PARTITION = 10**6  # elements; less is a tensor of its own
_START_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor (runtime/zero/stage_1_and_2.py)

_COPY_FIX = "keep one copy: nbmerge.merge does, because a plain tensor beside DTensors is whole on every rank"
_TRIM_FIX = "cut it back to the size that the model has: nbmerge.merge trims every shard to its own box"


def replicated_concatenated(asked: Mismatch) -> Iterator[Candidate]:
    """Every rank holds the whole tensor, and the copies were put one after the other.

    got[d] = n · expected[d]. verl's merger concatenates every tensor that is no DTensor.
    """
    if asked.shapes is None:
        return
    got, expected = asked.shapes
    if expected == () and len(got) == 1:
        dim, total, one = 0, got[0], 1
    elif found := asked.other_dim():
        dim, total, one = found
    else:
        return
    if one < 1 or total % one or total // one < 2:
        return
    n = total // one
    usual = dim == 0 and len(expected) < 2  # what FSDP leaves whole: norms, biases, buffers
    if fit := fit_ranks([n], asked.known.ranks, Strength.FAIR if usual else Strength.WEAK):
        what = "a scalar" if expected == () else "a replicated tensor"
        yield Candidate(
            "replicated, concatenated",
            f"{what} was concatenated once for each of {n} ranks{dim_words(expected, dim)}",
            evidence(f"{total} = {n} · {one}", fit.said),
            fit.strength,
            _COPY_FIX,
            fit.counts,
            ("verl 4671", "verl 7610", "oumi 2618"),
        )


def ceil_padding(asked: Mismatch) -> Iterator[Candidate]:
    """Every rank's shard is padded to the largest one, and the padding was not trimmed.

    got[d] = n · ⌈expected[d] / n⌉: FSDP2 keeps the padded storage of an uneven shard.
    """
    if (found := asked.other_dim()) is None:
        return
    dim, total, one = found
    if one < 1 or total <= one:
        return
    ranks = asked.known.ranks
    counts = _paddings(total, one, 1)
    if ranks is None or ranks not in counts:
        counts = _plausible(counts, one)
    usual = any(n <= _NODES or n % _NODE == 0 for n in counts) and 4 * (total - one) <= total
    tokens = dim == 0 and is_vocabulary(asked.name)  # a vocabulary is padded for other reasons far more often
    if fit := fit_ranks(counts, ranks, Strength.FAIR if usual and not tokens else Strength.WEAK):
        n = fit.likeliest
        yield Candidate(
            "ceil padding",
            f"the padding of an uneven shard was not trimmed{dim_words(asked.expected or (), dim)} ({fit.words})",
            evidence(f"{total} = {n} · ⌈{one}/{n}⌉", fit.said),
            fit.strength,
            _TRIM_FIX,
            fit.counts,
            ("verl 834",),
        )


def _plausible(counts: Sequence[int], size: int) -> tuple[int, ...]:
    """Numbers of ranks that one meets, each of which holds two units or more: n · ⌈size/n⌉ with n = total says nothing.

    size: in units that are never cut.
    """
    return tuple(n for n in counts if n <= _USUAL_RANKS and n < size and ceil_div(size, n) > 1)


@lru_cache(maxsize=4096)
def _paddings(total: int, one: int, unit: int) -> tuple[int, ...]:
    """Numbers of ranks n, from 2 on, with total = unit · n · ⌈one / (unit · n)⌉."""
    parts, rest = divmod(total, unit)
    if rest:
        return ()
    divisors = [d for d in range(1, min(isqrt(parts), MOST_RANKS) + 1) if parts % d == 0]
    counts = {n for d in divisors for n in (d, parts // d) if 2 <= n <= MOST_RANKS}
    return tuple(n for n in sorted(counts) if unit * n * ceil_div(one, unit * n) == total)


def flat_alignment(asked: Mismatch) -> Iterator[Candidate]:
    """A flat vector of all parameters was padded so that every rank's part begins at an aligned byte.

    got = 2n · ⌈expected / 2n⌉ elements: DeepSpeed's ZeRO stages 1 and 2 (runtime/zero/stage_1_and_2.py).
    """
    if asked.shapes is None or any(len(shape) != 1 for shape in asked.shapes):
        return
    (total,), (used,) = asked.shapes
    if used < 1 or total <= used or total % _START_ALIGNMENT:
        return
    flat = "flat" in asked.name or "partition" in asked.name or (not asked.name and total >= _SMALL_PARTITION)
    counts = _paddings(total, used, _START_ALIGNMENT)
    if asked.known.ranks not in counts:
        counts = _plausible(counts, ceil_div(used, _START_ALIGNMENT))
    fit = fit_ranks(counts, asked.known.ranks, Strength.FAIR)
    if fit is None:
        return
    n = fit.likeliest
    yield Candidate(
        "flat alignment padding",
        f"{total - used} elements of alignment padding end the flat partition ({fit.words}); no weight is lost",
        evidence(f"{total} = 2·{n} · ⌈{used}/(2·{n})⌉", fit.said),
        fit.strength if flat else Strength.WEAK,
        "leave the last elements out: they belong to no parameter",
        fit.counts,
        ("DeepSpeed 1317",),
    )


def one_shard(asked: Mismatch) -> Iterator[Candidate]:
    """One rank's part was taken for the whole: got[d] = ⌈expected[d] / n⌉, or what is left for the last rank."""
    if (found := asked.other_dim()) is None:
        return
    dim, part, whole = found
    if part < 1 or part >= whole:
        return
    counts = _shard_counts(part, whole, asked.known.ranks)
    exact = whole % part == 0
    if fit := fit_ranks(counts, asked.known.ranks, Strength.FAIR if exact else Strength.WEAK):
        n = fit.counts[0]
        last = ceil_div(whole, n) != part
        arithmetic = f"{part} = {whole} / {n}" if whole == n * part else f"{part} = ⌈{whole}/{n}⌉"
        if last:
            start, length = _last_chunk(whole, n)
            arithmetic = f"{length} = {whole} - {start // ceil_div(whole, n)} · ⌈{whole}/{n}⌉"
        yield Candidate(
            "one shard",
            f"it is one rank's shard, 1/{n} of the tensor{dim_words(asked.expected or (), dim)}"
            + (", the last and smaller one" if last else ""),
            evidence(arithmetic, fit.said),
            fit.strength,
            "put the shards of all ranks together: open the whole checkpoint directory, not one rank's file",
            fit.counts,
            ("lmms-engine 160",),
        )


def _shard_counts(part: int, whole: int, ranks: int | None) -> list[int]:
    """Numbers of ranks of which one holds `part` of `whole` rows, as torch.chunk cuts them; the least first."""
    least = ceil_div(whole, part)
    counts = [n for n in range(least, min(least + 64, MOST_RANKS) + 1) if ceil_div(whole, n) == part]
    if ranks is not None and ranks > 1 and ranks not in counts and _last_chunk(whole, ranks)[1] == part:
        counts.append(ranks)
    return counts


def _last_chunk(whole: int, n: int) -> tuple[int, int]:
    """Start and length of the last chunk that is not empty."""
    size = ceil_div(whole, n)
    return chunk_bounds(whole, n, ceil_div(whole, size) - 1)


def block_of_mesh(asked: Mismatch) -> Iterator[Candidate]:
    """One rank's block of a tensor that two or more dimensions of a mesh cut: got[d] = expected[d] / n[d]."""
    if asked.shapes is None or len(asked.shapes[0]) != len(asked.shapes[1]):
        return
    got, expected = asked.shapes
    if any(a < 1 or b % a for a, b in zip(got, expected, strict=True)):
        return
    parts = tuple(b // a for a, b in zip(got, expected, strict=True))
    if sum(part > 1 for part in parts) < 2:
        return
    if fit := fit_ranks([numel(parts)], asked.known.ranks, Strength.WEAK):
        cuts = " · ".join(str(part) for part in parts if part > 1)
        where = " and ".join(f"1/{part} along dimension {dim}" for dim, part in enumerate(parts) if part > 1)
        yield Candidate(
            "block of a mesh",
            f"it is one rank's block: {where}",
            evidence(f"{numel(expected)} = {cuts} · {numel(got)}", fit.said),
            fit.strength,
            "put the blocks of all ranks together: open the whole checkpoint directory, not one rank's file",
            fit.counts,
        )


def wrong_dimension(asked: Mismatch) -> Iterator[Candidate]:
    """Shards of one dimension were concatenated along another: got[a] = expected[a] / n, got[b] = n · expected[b]."""
    if asked.shapes is None or len(asked.shapes[0]) != len(asked.shapes[1]):
        return
    differ = [(d, a, b) for d, (a, b) in enumerate(zip(*asked.shapes, strict=True)) if a != b]
    if len(differ) != 2 or any(a < 1 or b < 1 for _, a, b in differ):
        return
    (cut, less, full), (along, more, one) = sorted(differ, key=lambda item: item[1] > item[2])
    if full <= less or full % less or more != full // less * one:
        return
    n = full // less
    if fit := fit_ranks([n], asked.known.ranks, Strength.WEAK):
        yield Candidate(
            "wrong dimension concatenated",
            f"{n} shards of dimension {cut} were concatenated along dimension {along}",
            evidence(f"{more} = {n} · {one}", f"{full} = {n} · {less}", fit.said),
            fit.strength,
            f"concatenate along dimension {cut}, as the tensor's placement Shard({cut}) says",
            fit.counts,
        )


def transposed(asked: Mismatch) -> Iterator[Candidate]:
    """The last two dimensions, or all of them, stand in another order."""
    if asked.shapes is None:
        return
    got, expected = asked.shapes
    if len(got) < 2 or sorted(got) != sorted(expected):
        return
    swapped = (*expected[:-2], expected[-1], expected[-2])
    if got == swapped:
        sentence, strength = "its last two dimensions are exchanged", Strength.STRONG
        if len(got) == 2:
            sentence = "it is transposed: [in, out] where [out, in] is meant, or the other way round"
    else:
        sentence, strength = "its dimensions stand in another order", Strength.FAIR
    yield Candidate(
        "transposed",
        sentence,
        evidence(f"{product(got)} = {product(expected)}", f"{list(got)} and {list(expected)} have the same sizes"),
        strength,
        "transpose it; Conv1D layers (GPT-2) and packed experts of some families are published as [in, out]",
    )


def flat_shard(asked: Mismatch) -> Iterator[Candidate]:
    """A flattened tensor, whole or one rank's part of it: ⌈numel / n⌉ elements, the last one padded."""
    if asked.shapes is None:
        return
    got, expected = asked.shapes
    if len(got) != 1 or len(expected) < 2 or got[0] < 1 or numel(expected) < 2:
        return
    held, full = got[0], numel(expected)
    fix = "give it the model's shape again; FSDP1 and DeepSpeed store parameters flattened"
    if held == full:
        yield Candidate("flat", "it is the whole tensor, flattened", (f"{held} = {product(expected)}",),
                        Strength.STRONG, fix)  # fmt: skip
        return
    if held > full:
        counts: Sequence[int] = _paddings(held, full, 1)
        counts = counts if asked.known.ranks in counts else _plausible(counts, full)
        arithmetic, what = "{held} = {n} · ⌈{full}/{n}⌉", "it is flattened, with the padding of its last shard"
    else:
        counts = _flat_counts(held, full, asked.known.ranks)
        arithmetic, what = "{held} = ⌈{full}/{n}⌉", "it is one rank's part of the flattened tensor"
    if fit := fit_ranks(counts, asked.known.ranks, Strength.FAIR if full % held == 0 else Strength.WEAK):
        n = fit.likeliest
        yield Candidate(
            "flat shard",
            f"{what} ({fit.words})",
            evidence(arithmetic.format(held=held, full=full, n=n), f"{full} = {product(expected)}", fit.said),
            fit.strength,
            "put the parts of all ranks together, keep as many elements as the shape has, and reshape; "
            "DeepSpeed's ZeRO stage 3 stores parameters so",
            fit.counts,
            ("DeepSpeed 1317",),
        )


def _flat_counts(held: int, full: int, ranks: int | None) -> list[int]:
    """Numbers of ranks n with ⌈full / n⌉ = held."""
    least = ceil_div(full, held)
    counts = [n for n in range(max(least, 2), least + 64) if ceil_div(full, n) == held]
    if ranks is not None and ranks > 1 and ranks not in counts and ceil_div(full, ranks) == held:
        counts.append(ranks)
    return counts


def empty_placeholder(asked: Mismatch) -> Iterator[Candidate]:
    """Nothing is stored in this file: a placeholder of ZeRO stage 3, or the empty shard of one of the last ranks."""
    if asked.shapes is None or numel(asked.shapes[0]) or not numel(asked.shapes[1]):
        return
    got, expected = asked.shapes
    fact = f"0 = {product(got)}"
    if len(got) == len(expected) and got[1:] == expected[1:]:
        yield Candidate(
            "empty shard",
            "it is the empty shard of a rank that was left without rows",
            evidence(fact, f"{expected[0]} rows over more ranks than ⌈rows / ranks⌉ fill"),
            Strength.STRONG,
            "put the shards of all ranks together: open the whole checkpoint directory, not one rank's file",
        )
    if got == (0,):
        yield Candidate(
            "empty placeholder",
            "it is a placeholder: ZeRO stage 3 keeps the weights in the files of the optimizer states",
            evidence(fact, "zero-size tensors stand in for all partitioned parameters in model_states.pt"),
            Strength.STRONG,
            "read the weights from the *_optim_states.pt files beside it, or save with "
            "stage3_gather_16bit_weights_on_model_save",
        )
    elif len(got) != len(expected) or got[1:] != expected[1:]:
        yield Candidate("empty placeholder", "it holds no elements", (fact,), Strength.STRONG,
                        "look for the file or the rank that holds this tensor")  # fmt: skip
