"""The table of patterns: no shapes break it, its arithmetic is true, and it finds what was done to a shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nbmerge.explaining.candidates import Known, Mismatch, Strength
from nbmerge.explaining.table import PATTERNS, candidates, why
from tests.explaining.questions import ask, causes, equations, first_ones, is_true

dims = st.one_of(st.integers(0, 40), st.integers(0, 10**5), st.integers(0, 2**70))
shapes = st.lists(dims, max_size=5).map(tuple)
sizes = st.integers(2, 5000)
ranks = st.integers(2, 64)
names = st.sampled_from(
    ["", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight", "x.mlp.gate_proj.weight", "linear_qkv.weight",
     "model.layers.3.mlp.experts.gate_up_proj", "module.a.base_layer.weight", "flat_param", "a\nb.experts.w.weight7"]
)  # fmt: skip
configs = st.dictionaries(
    st.sampled_from(["num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size",
                     "num_experts", "num_hidden_layers", "vocab_size", "model_type", "text_config"]),
    st.one_of(st.integers(-3, 300), st.sampled_from(["llama", None, True, 2.5, {"head_dim": 4}])),
)  # fmt: skip


class TestAnyQuestion:
    @given(st.none() | shapes, st.none() | shapes, names, st.none() | st.integers(-1, 10**6), configs)
    @example((0,), (), "", 1, {})
    @example((1,), (0,), "", 8, {})
    def test_is_answered_and_every_equation_is_true(self, got, expected, name, count, config):
        for each in candidates(Mismatch(got, expected, name, Known(count, config))):
            assert each.evidence and each.sentence and each.fix and str(each)
            assert all(is_true(equation) for equation in equations(each)), each

    @given(shapes, names, configs)
    def test_of_equal_shapes_has_no_candidates(self, shape, name, config):
        assert candidates(Mismatch(shape, shape, name, Known(8, config))) == ()

    @given(shapes, shapes)
    def test_is_answered_strongest_first(self, got, expected):
        found = candidates(ask(got, expected))
        assert all(a.strength >= b.strength for a, b in pairwise(found))

    def test_has_patterns_that_each_say_what_they_look_for(self):
        assert all(pattern.__doc__ for pattern in PATTERNS)
        assert len(set(PATTERNS)) == len(PATTERNS)


def is_first(pattern: str, got, expected, n: int, name: str = "") -> None:
    """Among the candidates without the number of ranks, and first or tied with it."""
    assume(got != expected)
    assert pattern in causes(got, expected, name), causes(got, expected, name)
    known = causes(got, expected, name, n)
    assert pattern in first_ones(known), known
    assert known[pattern].strength is Strength.STRONG


class TestWhatWasDoneToAShape:
    """Each cause made on purpose must be found, and be first, or tied, once the number of ranks is known."""

    @given(st.lists(sizes, max_size=3).map(tuple), ranks)
    def test_copies_were_concatenated(self, shape, n):
        got = (n * shape[0], *shape[1:]) if shape else (n,)
        is_first("replicated, concatenated", got, shape, n)

    @given(st.lists(sizes, min_size=1, max_size=3).map(tuple), ranks, st.integers(0, 2))
    def test_padding_was_kept(self, shape, n, dim):
        dim %= len(shape)
        padded = n * -(-shape[dim] // n)
        assume(padded != shape[dim] and -(-shape[dim] // n) > 1)  # one row each needs the number of ranks
        is_first("ceil padding", (*shape[:dim], padded, *shape[dim + 1 :]), shape, n)

    @given(st.lists(sizes, min_size=1, max_size=3).map(tuple), ranks, st.integers(0, 2), st.booleans())
    def test_one_shard_was_taken_for_the_whole(self, shape, n, dim, last):
        dim %= len(shape)
        size = -(-shape[dim] // n)
        part = shape[dim] - size * (-(-shape[dim] // size) - 1) if last else size
        got = (*shape[:dim], part, *shape[dim + 1 :])
        assume(got != shape and "one shard" in causes(got, shape))  # a small last shard needs the number of ranks
        is_first("one shard", got, shape, n)

    @given(st.lists(sizes, min_size=1, max_size=2).map(tuple), ranks)
    def test_a_last_shard_is_found_with_the_number_of_ranks(self, shape, n):
        size = -(-shape[0] // n)
        part = shape[0] - size * (-(-shape[0] // size) - 1)
        found = causes((part, *shape[1:]), shape, "", n)
        assert part == shape[0] or "one shard" in found

    @given(sizes, sizes, ranks, st.booleans())
    def test_the_wrong_dimension_was_concatenated(self, rows, columns, n, turned):
        whole = (n * rows, columns) if turned else (columns, n * rows)
        got = (rows, n * columns) if turned else (n * columns, rows)
        is_first("wrong dimension concatenated", got, whole, n)

    @given(sizes, sizes, ranks)
    def test_it_was_transposed(self, rows, columns, n):
        is_first("transposed", (rows, columns), (columns, rows), n)

    @given(sizes, sizes, ranks)
    def test_one_rank_holds_a_part_of_it_flattened(self, rows, columns, n):
        is_first("flat shard", (-(-rows * columns // n),), (rows, columns), n)

    @given(sizes, sizes, ranks)
    def test_it_is_flattened(self, rows, columns, n):
        is_first("flat", (rows * columns,), (rows, columns), n)

    @given(st.lists(sizes, min_size=1, max_size=3).map(tuple), ranks)
    def test_it_is_an_empty_placeholder(self, shape, n):
        is_first("empty placeholder", (0,), shape, n)
        is_first("empty shard", (0, *shape[1:]), shape, n)

    @given(st.integers(100, 300_000), sizes, st.sampled_from([1, 2, 4, 8, 16]), ranks)
    def test_the_vocabulary_was_padded(self, tokens, hidden, tensor_parallel, n):
        multiple = 128 * tensor_parallel
        padded = multiple * -(-tokens // multiple)
        is_first("vocabulary padded", (padded, hidden), (tokens, hidden), n, "model.embed_tokens.weight")

    @given(st.integers(10**6, 10**9), ranks)
    def test_a_flat_partition_was_aligned(self, used, n):
        total = 2 * n * -(-used // (2 * n))
        is_first("flat alignment padding", (total,), (used,), n)

    @given(st.integers(1, 12), st.integers(1, 6), st.sampled_from([32, 64, 128]), st.integers(1, 6), sizes)
    def test_key_value_heads_of_another_number(self, groups, each, dim, factor, hidden):
        heads = groups * each * factor
        other = groups * factor
        assume(other != groups)
        config = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": dim}
        found = causes((other * dim, hidden), (groups * dim, hidden), "layers.0.self_attn.k_proj.weight", **config)
        wanted = "query and key-value sizes exchanged" if other == heads else "other key-value heads"
        assert wanted in first_ones(found)
        fused = causes(
            ((heads + 2 * other) * dim, hidden), ((heads + 2 * groups) * dim, hidden), "linear_qkv.weight", **config
        )
        assert "other key-value heads" in first_ones(fused)

    @given(sizes, sizes, ranks)
    def test_gate_and_up_are_one_tensor(self, width, hidden, n):
        name = "model.layers.0.mlp.gate_proj.weight"
        found = causes((2 * width, hidden), (width, hidden), name, n, intermediate_size=width)
        assert "fused gate and up" in first_ones(found)

    @given(st.integers(2, 300), sizes, sizes)
    def test_experts_or_layers_are_one_tensor(self, number, rows, columns):
        for size, pattern in (("num_experts", "packed experts"), ("num_hidden_layers", "packed layers")):
            found = causes((number, rows, columns), (rows, columns), "x", **{size: number})
            assert pattern in first_ones(found)
            assert pattern in first_ones(causes((rows, columns), (number, rows, columns), "x", **{size: number}))


class TestTheNumberOfRanks:
    def test_rules_out_what_it_does_not_divide_into(self):
        assert "replicated, concatenated" in causes((1024,), (128,))
        assert "replicated, concatenated" not in causes((1024,), (128,), "", 6)
        assert causes((1024,), (128,), "", 1) == {}

    def test_is_weaker_as_a_multiple_which_one_dimension_of_a_mesh_explains(self):
        found = causes((1024,), (128,), "", 16)["replicated, concatenated"]
        assert found.strength is Strength.FAIR
        assert "8 divides the 16 ranks" in found.evidence[1]

    def test_that_is_not_known_leaves_all_that_fit(self):
        found = causes((3600,), (3584,), "model.norm.weight")["ceil padding"]
        assert {18, 20, 24, 25, 30, 36, 40} <= set(found.counts)
        assert "another number that fits" in found.sentence

    def test_cannot_speak_against_placements_that_are_recorded(self):
        recorded = Mismatch((1024,), (128,), "", Known(8, recorded=True))
        found = {each.pattern: each for each in candidates(recorded)}["replicated, concatenated"]
        assert found.strength is Strength.WEAK
        assert "recorded" in found.evidence[-1]


class TestNames:
    def test_of_every_wrapper_are_recognised(self):
        held = {"module._orig_mod.model._fsdp_wrapped_module.norm.weight": (4,)}
        asked = Mismatch(None, (4,), "model.norm.weight", Known(held=held))
        (found,) = candidates(asked)
        assert (found.pattern, found.strength) == ("wrapper prefix", Strength.STRONG)
        assert next(iter(held)) in found.evidence[0]

    def test_of_a_lora_base_layer(self):
        name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
        known = Known(held={name: (4, 4)})
        found = candidates(Mismatch(None, (4, 4), "model.layers.0.self_attn.q_proj.weight", known))
        assert found[0].pattern == "LoRA base layer"
        assert "--lora fold" in found[0].fix
        lora = candidates(Mismatch((2, 4), None, "model.q_proj.lora_A.default.weight"))
        assert lora[0].pattern == "LoRA tensor"

    @pytest.mark.parametrize(
        ("missing", "held"),
        [
            ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"),
            ("model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"),
        ],
    )
    def test_of_fused_and_split_tensors(self, missing: str, held: str):
        known = Known(held={held: (6, 4)}, wanted={missing: (2, 4)})
        assert candidates(Mismatch(None, (2, 4), missing, known))[0].pattern == "fused or split"
        assert candidates(Mismatch((6, 4), None, held, known))[0].pattern == "fused or split"

    def test_of_another_layer_are_no_partners(self):
        known = Known(held={"model.layers.1.self_attn.qkv_proj.weight": (6, 4)})
        assert candidates(Mismatch(None, (2, 4), "model.layers.0.self_attn.q_proj.weight", known)) == ()

    def test_under_another_prefix(self):
        known = Known(held={"model.language_model.norm.weight": (4,)})
        assert (
            candidates(Mismatch(None, (4,), "language_model.model.norm.weight", known))[0].pattern == "another prefix"
        )


class TestTheSentenceOfAnError:
    def test_names_the_best_candidate_with_its_arithmetic(self):
        said = why(ask((3600,), (3584,), "model.norm.weight", 24), "no idea")
        assert said == "3600 = 24 · ⌈3584/24⌉: the padding of an uneven shard was not trimmed (24 ranks)"

    def test_names_all_that_are_equally_strong(self):
        assert why(ask((8,), (1,), "layer_scalar", 8), "").count("8 ranks") == 2

    def test_does_not_guess(self):
        assert why(ask((5, 7), (3, 11)), "no idea") == "no idea"


class TestImplausibleNumbersOfRanks:
    """What the arithmetic allows and nobody has is not offered: n · ⌈size/n⌉ with n = total is true of any shapes."""

    @pytest.mark.parametrize(("got", "expected"), [(5120, 4096), (4096, 3584)])
    def test_another_hidden_size_is_no_padding(self, got: int, expected: int):
        found = causes((got,), (expected,), "model.norm.weight")
        assert "ceil padding" not in found
        assert first_ones(found) == ["another size"]
        assert f"hidden_size is {got} in" in found["another size"].evidence[0]
        assert f"{expected} in" in found["another size"].evidence[0]

    def test_padding_to_a_number_nobody_meets_is_only_possible(self):
        found = causes((3 * 101,), (300,), "a.bias")["ceil padding"]
        assert (found.counts, found.strength) == ((101,), Strength.WEAK)

    @given(st.integers(1, 10**6), st.integers(1, 10**6))
    def test_are_never_offered(self, got: int, expected: int):
        for name in ("", "flat_param"):
            for each in causes((got,), (expected,), name).values():
                if each.pattern in ("ceil padding", "flat alignment padding"):
                    assert all(2 <= n <= 512 and n < expected and -(-expected // n) >= 2 for n in each.counts)

    def test_one_row_each_is_offered_where_the_number_is_known(self):
        assert "ceil padding" in causes((8,), (1,), "", 8)
        assert "ceil padding" not in causes((8,), (1,), "")

    def test_a_vocabulary_is_resized_or_padded_before_a_shard_is(self):
        found = causes((151936, 896), (151665, 896), "model.embed_tokens.weight")
        assert first_ones(found) == ["vocabulary resized"]
        assert "151936 = 1187 · 128, as padded vocabularies are" in found["vocabulary resized"].evidence
        assert next(iter(causes((152064, 896), (151936, 896), "lm_head.weight"))) == "vocabulary padded"
        assert "1 token more" in causes((32001, 4), (32000, 4), "lm_head.weight")["vocabulary resized"].sentence
        assert causes((151944, 896), (151936, 896), "lm_head.weight")["ceil padding"].strength is Strength.WEAK
        assert first_ones(causes((151944, 896), (151936, 896), "lm_head.weight", 24)) == ["ceil padding"]


class TestHeads:
    HEAD, SCORE = {"lm_head.weight": (64, 4)}, {"score.weight": (1, 4)}

    def of(self, got, expected, name: str, held, wanted, **config):
        known = Known(None, config, held=held, wanted=wanted)
        return candidates(Mismatch(got, expected, name, known))

    @pytest.mark.parametrize("tied", [True, False])
    def test_an_actor_under_a_critics_config(self, tied: bool):
        config = {"architectures": ["Qwen2ForTokenClassification"], "tie_word_embeddings": tied}
        for got, expected, name in ((None, (1, 4), "score.weight"), ((64, 4), None, "lm_head.weight")):
            (found,) = self.of(got, expected, name, self.HEAD, self.SCORE, **config)
            assert (found.pattern, found.strength) == ("another head", Strength.STRONG)
            assert "the checkpoint has a language model's head" in found.sentence
            assert "leave is_value_model out" in found.fix
            assert "Qwen2ForTokenClassification" in found.evidence[1]

    def test_a_critic_under_an_actors_config(self):
        for got, expected, name in ((None, (64, 4), "lm_head.weight"), ((1, 4), None, "score.weight")):
            (found,) = self.of(got, expected, name, self.SCORE, self.HEAD)
            assert found.pattern == "another head"
            assert "is_value_model=True" in found.fix

    def test_a_critics_head_alone_is_likely(self):
        (found,) = self.of((1, 4), None, "v_head.summary.weight", {}, {})
        assert (found.pattern, found.strength) == ("another head", Strength.FAIR)
        assert "the checkpoint has a critic's" in found.sentence
        (found,) = self.of(None, (1, 4), "score.weight", {}, {})
        assert "the model has a critic's" in found.sentence

    def test_a_head_that_config_does_not_tie_is_no_copy(self):
        embedding = {"model.embed_tokens.weight": (64, 4)}
        held = {**embedding, **self.HEAD}
        assert self.of((64, 4), None, "lm_head.weight", held, embedding, tie_word_embeddings=False) == ()
        (found,) = self.of((64, 4), None, "lm_head.weight", held, embedding, tie_word_embeddings=True)
        assert found.pattern == "tied head doubled"
        (found,) = self.of((64, 4), None, "lm_head.weight", held, embedding)
        assert (found.pattern, found.strength) == ("tied head doubled", Strength.FAIR)

    def test_a_head_of_which_nothing_else_is_known_may_be_a_copy(self):
        (found,) = self.of((), None, "lm_head.weight", {}, {})
        assert (found.pattern, found.strength) == ("tied head doubled", Strength.WEAK)

    def test_a_class_without_a_head_is_named(self):
        (found,) = self.of((64, 4), None, "lm_head.weight", self.HEAD, {}, architectures=["Qwen2Model"])
        assert (found.pattern, found.evidence) == ("another head", ("config.json names Qwen2Model",))

    @pytest.mark.parametrize(
        ("got", "expected", "words", "fix"),
        [(1, 152064, "the checkpoint's head is that of a critic", "is_value_model=True"),
         (152064, 1, "config.json makes the head of a critic", "leave is_value_model out"),
         (5, 152064, "a classifier of 5 labels", "pass the config")],
    )  # fmt: skip
    def test_of_one_row_for_each_label_are_no_vocabulary(self, got: int, expected: int, words: str, fix: str):
        found = causes((got, 3584), (expected, 3584), "lm_head.weight")
        assert first_ones(found)[0] == "another head"
        assert words in found["another head"].sentence and fix in found["another head"].fix
        assert "vocabulary resized" not in found


class TestLayers:
    @staticmethod
    def names(count: int) -> dict[str, tuple[int, ...]]:
        return {f"model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(count)}

    @pytest.mark.parametrize(("held", "wanted"), [(3, 4), (4, 3)])
    def test_of_another_number(self, held: int, wanted: int):
        got, expected = (None, (8, 4)) if held < wanted else ((8, 4), None)
        known = Known(None, {"num_hidden_layers": wanted}, held=self.names(held), wanted=self.names(wanted))
        (found,) = candidates(Mismatch(got, expected, "model.layers.3.mlp.up_proj.weight", known))
        assert (found.pattern, found.strength) == ("another number of layers", Strength.STRONG)
        assert f"the checkpoint has {held} layers" in found.sentence
        assert found.evidence[1] == f"config.json has num_hidden_layers {wanted}"
        assert ("pipeline stage" in found.sentence) == (held < wanted)
        assert f"set num_hidden_layers to {held}" in found.fix

    def test_that_are_there_on_both_sides_are_something_else(self):
        known = Known(held=self.names(4), wanted={**self.names(4), "model.layers.1.mlp.extra": (2,)})
        assert candidates(Mismatch(None, (2,), "model.layers.1.mlp.extra", known)) == ()


class TestManyNames:
    def test_take_no_more_time_than_their_number(self):
        """4,000 names on each side that share nothing: each question took a walk over all of them."""
        import time

        from nbmerge.explaining.subjects import subjects_of

        words = ["".join(chr(97 + int(digit)) for digit in str(i)) for i in range(4000)]
        held = {f"model.{word}.weight": (4,) for word in words}
        wanted = {f"net.{word}.q_proj.kernel": (4,) for word in words}
        known = Known(held=held, wanted=wanted)
        asked = [Mismatch(None, (4,), name, known) for name in wanted] + [Mismatch((4,), None, n, known) for n in held]
        begun = time.perf_counter()
        assert len(subjects_of(asked)) == 8000
        assert time.perf_counter() - begun < 10

    def test_with_one_partner_for_all_are_told_with_a_few(self):
        held = {f"{'module.' * count}a.weight": (4,) for count in range(1, 60)}
        known = Known(held=held, wanted={"a.weight": (4,)})
        assert len(candidates(Mismatch(None, (4,), "a.weight", known))) == 4


def test_another_size_says_which():
    config = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944}
    found = causes((5120, 13824), (3584, 18944), "model.layers.0.mlp.down_proj.weight", **config)
    assert "Qwen2.5 14B" in found["another size"].sentence
    assert found["another size"].evidence[0] == "hidden_size is 5120, config.json says 3584"
