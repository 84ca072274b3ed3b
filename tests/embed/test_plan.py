import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import family

from armo.data.conversation import Message
from armo.embed.boundary import PromptGroup
from armo.embed.plan import (
    WORTH_SHARING,
    Plan,
    Span,
    TextPlanner,
    TokenSequence,
    _add_group,
    _common_length,
    within,
)
from armo.embed.spec import BackboneError, BackboneSpec

EGG = (Message("user", "How do I boil an egg?"),)
FOX = (
    Message("system", "Be brief."),
    Message("user", "Is the fox quick?"),
    Message("assistant", "Yes, it is."),
    Message("user", "And the dog?"),
)
LONG = (Message("user", " ".join(f"Say {k} words of risk." for k in range(30))),)
WORDS = (
    "egg",
    "Put it in",
    "hot water",
    "- one\n",
    "**three**",
    "risks!",
    "\n\n",
    "犬",
    "fox",
    "7",
)
ENDLESS = "water " * 300
CAUSAL = {"causal": True, "share": True}


def words(at_least, at_most):
    chosen = st.lists(st.sampled_from(WORDS), min_size=at_least, max_size=at_most)
    return chosen.map(" ".join).filter(str.strip)


@st.composite
def drafts(draw):
    """Some prompts of one or two user turns, and up to four responses to each."""
    turns = st.lists(words(1, 12), min_size=1, max_size=2)
    return [
        (draw(turns), draw(st.lists(words(1, 20), max_size=4)))
        for _ in range(draw(st.integers(0, 4)))
    ]


# Built outside of the strategy: the checks of its types draw random numbers of their own.
def groups_of(drafts):
    groups = []
    for texts, responses in drafts:
        first = [
            message
            for text in texts[:-1]
            for message in (Message("user", text), Message("assistant", "Yes."))
        ]
        groups.append(PromptGroup((*first, Message("user", texts[-1])), responses))
    return groups


def chat_planner(tokenizer, **changes):
    limits = {"max_tokens": 128, "max_prompt_tokens": 64}
    return TextPlanner(BackboneSpec("tiny", **{**limits, **changes}), tokenizer)


def encoder_planner(tokenizer, **changes):
    return chat_planner(tokenizer, pooling="mean", **changes)


def planner_of(kind, request, **changes):
    tokenizer = request.getfixturevalue(kind).tokenizer
    return (encoder_planner if kind == "encoder" else chat_planner)(tokenizer, **changes)


def reads(plan, *, causal):
    """For each target what is pooled: the tokens that matter to it, and the span among them."""
    found = {}

    def note(ids, spans, shift=0):
        for span in spans:
            start, end = span.start + shift, span.end + shift
            assert shift <= start < end <= len(ids)
            seen = ids[:end] if causal else ids
            found.setdefault(span.target, []).append((seen, start, end))

    for sequence in plan.sequences:
        note(sequence.ids, sequence.spans)
    for group in plan.shared:
        note(group.prefix.ids, group.prefix.spans)
        for tail in group.tails:
            note(group.prefix.ids + tail.ids, tail.spans, len(group.prefix.ids))
    return found


def middle_out(ids, limit):
    front = limit // 2
    return ids if len(ids) <= limit else ids[:front] + ids[front - limit :]


def chat_ids(tokenizer, messages, **options):
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_chat(planner, groups):
    """What is to be read of conversations, one at a time, and which of it was cut."""
    spec, tokenizer = planner.spec, planner.tokenizer
    prompts, responses, cut = [], [], []
    for group in groups:
        opened = spec.prompt_position == "generation_prompt"
        ids = chat_ids(tokenizer, group.prompt, add_generation_prompt=opened)
        head = middle_out(ids, spec.max_prompt_tokens)
        prompts.append((head, 0 if spec.pooling == "mean" else len(head) - 1, len(head)))
        cut.append((len(prompts) - 1, None, len(ids) > len(head)))
        for response in group.responses:
            full = chat_ids(tokenizer, (*group.prompt, Message("assistant", response)))
            assert full[: len(ids)] == ids
            tail = full[len(ids) :]
            room = spec.max_tokens - len(head)
            kept = tail if len(tail) <= room else tail[: room - 1] + tail[-1:]
            row = head + kept
            start = len(head) if spec.pooling == "mean" else len(row) - 1
            responses.append((row, start, len(row)))
            changed = len(ids) > len(head) or len(tail) > room
            cut.append((None, len(responses) - 1, changed))
    return prompts, responses, cut


def slow_encoder(planner, groups):
    """The same for an encoder."""
    spec, tokenizer = planner.spec, planner.tokenizer
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    prompts, responses, cut = [], [], []
    for group in groups:
        text = "\n\n".join(message.content for message in group.prompt)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        head = [first, *middle_out(ids, spec.max_prompt_tokens), last]
        prompts.append((head, 0, len(head)))
        cut.append((len(prompts) - 1, None, len(ids) > spec.max_prompt_tokens))
        for response in group.responses:
            tail = tokenizer(response, add_special_tokens=False)["input_ids"]
            kept = tail[: spec.max_tokens - len(head) - 1]
            row = [*head, *kept, last]
            responses.append((row, len(head), len(row)))
            cut.append((None, len(responses) - 1, cut_prompt(ids, spec) or len(kept) < len(tail)))
    return prompts, responses, cut


def cut_prompt(ids, spec):
    return len(ids) > spec.max_prompt_tokens


def expected_of(slow):
    """The slow way's results by target, and the targets that it cut."""
    prompts, responses, cut = slow
    found = {k: [read] for k, read in enumerate([*prompts, *responses])}
    changed = {
        number if response is None else len(prompts) + response
        for number, response, is_cut in cut
        if is_cut
    }
    return found, changed


# What is read is the same, however it is planned.


@given(
    drafts=drafts(),
    pooling=st.sampled_from(["last", "mean"]),
    position=st.sampled_from(["turn_end", "generation_prompt"]),
    limits=st.sampled_from([(96, 48), (60, 21), (40, 36), (20, 9), (500, 250)]),
    causal=st.booleans(),
    share=st.booleans(),
)
def test_a_conversation_is_read_as_if_it_came_alone(
    causal_tokenizer, drafts, pooling, position, limits, causal, share
):
    groups = groups_of(drafts)
    planner = chat_planner(
        causal_tokenizer,
        pooling=pooling,
        prompt_position=position,
        max_tokens=limits[0],
        max_prompt_tokens=limits[1],
    )
    plan = planner.plan(groups, causal=causal, share=share)
    expected, changed = expected_of(slow_chat(planner, groups))
    assert reads(plan, causal=causal) == expected
    assert plan.truncated == changed
    assert plan.missing == set()
    assert plan.targets == len(expected)


@given(
    drafts=drafts(),
    limits=st.sampled_from([(96, 48), (60, 21), (40, 36), (20, 9), (500, 250)]),
    share=st.booleans(),
)
def test_an_encoder_reads_the_prompt_alone_and_the_response_beside_it(
    encoder, drafts, limits, share
):
    groups = groups_of(drafts)
    planner = encoder_planner(encoder.tokenizer, max_tokens=limits[0], max_prompt_tokens=limits[1])
    plan = planner.plan(groups, causal=False, share=share)
    expected, changed = expected_of(slow_encoder(planner, groups))
    assert reads(plan, causal=False) == expected
    assert plan.truncated == changed
    assert plan.missing == set()
    assert plan.shared == []


@pytest.fixture(scope="session")
def causal_tokenizer(causal):
    return causal.tokenizer


@given(drafts=drafts())
def test_the_tokens_of_a_plan_are_those_of_all_its_sequences(causal_tokenizer, drafts):
    plan = chat_planner(causal_tokenizer).plan(groups_of(drafts), **CAUSAL)
    total = sum(len(sequence.ids) for sequence in plan.sequences)
    for group in plan.shared:
        total += len(group.prefix.ids) + sum(len(tail.ids) for tail in group.tails)
    assert plan.tokens == total


# What is run only once.


def tokens_of(planner, groups, **how):
    return planner.plan(groups, **{**CAUSAL, **how}).tokens


def apart_and_together(planner, groups):
    """Tokens of the conversations, each run on its own, and of the prompts with all tails."""
    (prompts, rows, _) = slow_chat(planner, groups)
    alone = sum(len(ids) for ids, _, _ in rows)
    at = iter(rows)
    once = 0
    for group, (head, _, _) in zip(groups, prompts, strict=True):
        once += len(head) + sum(len(next(at)[0]) - len(head) for _ in group.responses)
    return alone, once


@pytest.mark.parametrize("responses", [2, 16])
def test_a_long_prompt_is_run_once_for_all_its_responses(causal_tokenizer, responses):
    planner = chat_planner(causal_tokenizer, max_tokens=400, max_prompt_tokens=300)
    groups = [PromptGroup(LONG, [f"Say {k}." for k in range(responses)])]
    alone, once = apart_and_together(planner, groups)
    assert once < alone / responses * 1.5
    assert tokens_of(planner, groups) == once
    assert tokens_of(planner, groups, share=False) == alone
    prompt = len(slow_chat(planner, groups)[0][0][0])
    assert tokens_of(planner, groups, causal=False) == alone + prompt


@given(drafts=drafts())
def test_sharing_never_runs_more_tokens(causal_tokenizer, drafts):
    planner = chat_planner(causal_tokenizer)
    groups = groups_of(drafts)
    shared = tokens_of(planner, groups)
    assert shared <= tokens_of(planner, groups, share=False)
    assert shared <= tokens_of(planner, groups, causal=False)
    assert tokens_of(planner, groups, causal=False, share=True) == tokens_of(
        planner, groups, causal=False, share=False
    )


@given(drafts=drafts())
def test_a_prompt_is_shared_where_that_saves_a_fiftieth(causal_tokenizer, drafts):
    planner = chat_planner(causal_tokenizer)
    expected = []
    groups = groups_of(drafts)
    for group in groups:
        alone, once = apart_and_together(planner, [group])
        if group.responses and alone - once > WORTH_SHARING * alone:
            expected.append(len(group.responses))
    plan = planner.plan(groups, **CAUSAL)
    assert [len(group.tails) for group in plan.shared] == expected


def test_short_prompts_of_long_responses_are_not_worth_it(causal_tokenizer):
    alone, once, shared = [], [], []
    for copies in (300, 900):
        ends = ["water " * copies, "water " * (copies - 9)]
        group = PromptGroup((Message("user", "1"),), ends)
        planner = chat_planner(causal_tokenizer, max_tokens=3000)
        plan = planner.plan([group], **CAUSAL)
        counts = apart_and_together(planner, [group])
        alone.append(counts[0])
        once.append(counts[1])
        shared.append(len(plan.shared))
        assert len(plan.sequences) == 2 * (not plan.shared)
        assert plan.tokens == (counts[1] if plan.shared else counts[0])
    assert shared == [1, 0]
    savings = [1 - n / m for n, m in zip(once, alone, strict=True)]
    assert savings[1] < WORTH_SHARING < savings[0]


def test_a_prompt_with_one_response_is_run_with_it(causal_tokenizer):
    planner = chat_planner(causal_tokenizer)
    plan = planner.plan([PromptGroup(FOX, ["Lazy."])], **CAUSAL)
    (sequence,) = plan.sequences
    assert plan.shared == []
    assert {span.target for span in sequence.spans} == {0, 1}


def test_a_prompt_without_responses_is_run_alone(causal_tokenizer):
    plan = chat_planner(causal_tokenizer).plan(
        [PromptGroup(FOX, []), PromptGroup(EGG, [])], **CAUSAL
    )
    assert [[span.target for span in sequence.spans] for sequence in plan.sequences] == [[0], [1]]
    assert plan.shared == []
    assert (plan.prompts, plan.responses) == (2, 0)


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_no_groups_make_an_empty_plan(request, kind):
    plan = planner_of(kind, request).plan([], causal=kind == "causal", share=True)
    assert (plan.targets, plan.tokens) == (0, 0)


# In these, a line break at the end of the prompt goes on into a response that begins with one.
JOINED = pytest.mark.parametrize("name", ["qwen2.5", "gemma2"])
BREAK = "\n\nCool it."


def joined(name, responses, **changes):
    """Plan a group; return its one shared prefix and what else is run, and the slow way's rows."""
    like = family(name)
    planner = chat_planner(like.tokenizer, max_tokens=400, max_prompt_tokens=300, **changes)
    plan = planner.plan([PromptGroup(EGG, responses)], **CAUSAL)
    prompt = like.encode(like.head(EGG, planner.spec.prompt_position))
    rows = [like.encode(like.conversation(EGG, response)) for response in responses]
    return plan, prompt, rows


def test_a_response_whose_first_token_reaches_into_the_prompt_shares_what_is_before():
    plan, prompt, rows = joined("qwen2.5", [BREAK, "Put it in.", "Wait."])
    (group,) = plan.shared
    assert plan.sequences == []
    assert rows[0][: len(prompt)] != prompt
    assert rows[1][: len(prompt)] == rows[2][: len(prompt)] == prompt
    assert group.prefix == TokenSequence(prompt[:-1], ())
    assert [tail.ids for tail in group.tails] == [
        prompt[-1:],
        *(row[len(prompt) - 1 :] for row in rows),
    ]
    assert plan.tokens == len(prompt) + sum(len(row) - len(prompt) + 1 for row in rows)
    found = reads(plan, causal=True)
    assert found == {k: [(ids, len(ids) - 1, len(ids))] for k, ids in enumerate([prompt, *rows])}


def test_where_all_responses_reach_into_the_prompt_its_end_is_one_more_tail():
    plan, prompt, rows = joined("qwen2.5", [BREAK, "\n\nWait."])
    (group,) = plan.shared
    assert plan.sequences == []
    assert [len(tail.ids) for tail in group.tails] == [1, *(len(r) - len(prompt) + 1 for r in rows)]
    assert reads(plan, causal=True)[0] == [(prompt, len(prompt) - 1, len(prompt))]


def test_a_single_response_that_reaches_into_the_prompt_shares_what_is_before():
    plan, prompt, (row,) = joined("qwen2.5", [BREAK])
    (group,) = plan.shared
    assert plan.sequences == []
    assert group.prefix.ids == prompt[:-1] == row[: len(prompt) - 1]
    # Nearly half of what the two take on their own.
    assert plan.tokens == len(row) + 1
    assert reads(plan, causal=True)[1] == [(row, len(row) - 1, len(row))]


def test_one_that_reaches_into_a_prompt_of_many_responses_costs_each_of_them_a_token():
    others = [f"Say {k}." for k in range(9)]
    plan, prompt, rows = joined("qwen2.5", [*others, BREAK])
    assert [len(group.tails) for group in plan.shared] == [11]
    assert plan.sequences == []
    # From as many as the prompt has tokens, that one is run on its own.
    others = [f"Say {k}." for k in range(2 * len(prompt))]
    plan, prompt, rows = joined("qwen2.5", [*others, BREAK])
    assert [len(group.tails) for group in plan.shared] == [len(others)]
    assert [sequence.ids for sequence in plan.sequences] == [rows[-1]]


@JOINED
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("position", ["turn_end", "generation_prompt"])
@given(
    responses=st.lists(
        st.sampled_from([BREAK, "\n\n", "\n", "\n- one", " Wait.", "Wait.", "1", ""]), max_size=5
    )
)
def test_what_reaches_into_a_prompt_is_read_as_if_it_came_alone(name, pooling, position, responses):
    plan, prompt, rows = joined(name, responses, pooling=pooling, prompt_position=position)
    found = pooled(plan)
    tokens = slow_pooled(prompt, 0 if pooling == "mean" else len(prompt) - 1)
    assert found.pop(0) == tokens
    for target, row in enumerate(rows, start=1):
        # A response's mean begins where it parts from its prompt.
        shared = next(
            (k for k, (a, b) in enumerate(zip(row, prompt, strict=False)) if a != b),
            min(len(row), len(prompt)),
        )
        assert found.pop(target) == slow_pooled(row, shared if pooling == "mean" else len(row) - 1)
    assert found == {}


# The plan of one group, from tokens alone.


def slow_pooled(ids, start, end=None):
    """Each token that is pooled: where it stands, and all that it is read after, itself last."""
    return [(k, tuple(ids[: k + 1])) for k in range(start, len(ids) if end is None else end)]


def pooled(plan):
    """The same for each target of a plan that a causal model runs."""
    found = {}

    def note(before, sequence):
        assert sequence.ids
        for span in sequence.spans:
            assert 0 <= span.start < span.end <= len(sequence.ids)
            first, last = (edge + len(before) for edge in (span.start, span.end))
            found.setdefault(span.target, [])
            found[span.target] += slow_pooled(before + sequence.ids, first, last)

    for sequence in plan.sequences:
        note([], sequence)
    for group in plan.shared:
        assert group.tails
        note([], group.prefix)
        for tail in group.tails:
            note(group.prefix.ids, tail)
    return {target: sorted(tokens) for target, tokens in found.items()}


@st.composite
def token_rows(draw):
    """A prompt and rows that go on from it, leave it early or end within it; each with a span."""
    prompt = draw(st.lists(st.integers(1, 3), min_size=1, max_size=14))
    starts = [draw(st.sampled_from([0, len(prompt) - 1]))]
    rows = []
    for _ in range(draw(st.integers(0, 6))):
        if rows and draw(st.integers(0, 4)) == 0:
            ids = draw(st.sampled_from(rows))
        else:
            kept = draw(st.just(len(prompt)) | st.integers(0, len(prompt)))
            ids = prompt[:kept] + draw(
                st.lists(st.integers(1, 3), min_size=0 if kept else 1, max_size=8)
            )
        rows.append(ids)
        last, anywhere = st.just(len(ids) - 1), st.integers(0, len(ids) - 1)
        starts.append(draw(last | anywhere | st.just(min(len(prompt), len(ids) - 1))))
    return prompt, rows, starts


def planned(prompt, rows, starts, **how):
    plan = Plan(prompts=1, responses=len(rows))
    spans = [
        Span(k, start, len(ids))
        for k, (ids, start) in enumerate(zip([prompt, *rows], starts, strict=True))
    ]
    sequences = [TokenSequence(ids, (span,)) for ids, span in zip(rows, spans[1:], strict=True)]
    _add_group(plan, prompt, spans[0], sequences, **{**CAUSAL, **how})
    return plan


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [True, False])
@settings(max_examples=200)
@given(drawn=token_rows())
def test_each_token_of_a_group_is_pooled_once_after_all_that_comes_before_it(drawn, causal, share):
    prompt, rows, starts = drawn
    plan = planned(*drawn, causal=causal, share=share)
    expected = {
        k: slow_pooled(ids, start)
        for k, (ids, start) in enumerate(zip([prompt, *rows], starts, strict=True))
    }
    assert pooled(plan) == expected
    if not (causal and share):
        assert plan.shared == []
    if not causal:
        assert [sequence.ids for sequence in plan.sequences] == [prompt, *rows]


def tokens_at(length, prompt, rows):
    """Tokens that are run when all rows that can share the first `length` ones of the prompt."""
    fit = [ids[:length] == prompt[:length] and len(ids) > length for ids in rows]
    run = [len(ids) - length * fits for ids, fits in zip(rows, fit, strict=True)]
    return len(prompt) + sum(run), sum(len(i) for i, fits in zip(rows, fit, strict=True) if fits)


@settings(max_examples=500)
@given(drawn=token_rows())
def test_a_group_shares_the_length_that_leaves_the_fewest_tokens(drawn):
    prompt, rows, _ = drawn
    plan, apart = planned(*drawn), planned(*drawn, share=False)
    assert plan.tokens <= apart.tokens
    whole = any(ids[: len(prompt)] == prompt and len(ids) > len(prompt) for ids in rows)
    assert apart.tokens == sum(map(len, rows)) + (0 if whole else len(prompt))
    choices = [tokens_at(length, prompt, rows) for length in range(len(prompt) + 1)]
    best = min(tokens for tokens, _ in choices)
    # Where two lengths are as good, but not of as many rows, either may be taken.
    worth = {
        apart.tokens - best > WORTH_SHARING * alone for tokens, alone in choices if tokens == best
    }
    assert bool(plan.shared) in worth
    assert plan.tokens == (best if plan.shared else apart.tokens)


@given(drawn=token_rows())
def test_what_is_common_ends_before_the_end_of_a_row(drawn):
    prompt, rows, _ = drawn
    for ids in rows:
        length = _common_length(ids, prompt)
        fits = [n for n in range(len(ids)) if n <= len(prompt) and ids[:n] == prompt[:n]]
        assert length == max(fits)


def test_a_group_is_planned_in_the_same_way_whatever_the_order_of_its_rows():
    prompt, rows = [1, 2, 3, 1, 2, 3], [[1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 1, 2, 4], [1, 5], [6]]
    starts = [5, 6, 5, 1, 0]
    plan = planned(prompt, rows, starts)
    back = planned(prompt, rows[::-1], [5, *starts[:0:-1]])
    assert plan.tokens == back.tokens
    assert len(plan.shared) == len(back.shared) == 1


def test_a_row_that_ends_within_the_prompt_is_read_from_its_last_token_on():
    prompt = [1, 2, 3, 4]
    plan = planned(prompt, [prompt, prompt[:3], [*prompt, 5]], [3, 3, 2, 4])
    (group,) = plan.shared
    # Three rows share three tokens at the most: the last token of each is its tail's.
    assert group.prefix.ids in ([1, 2, 3], [1, 2])
    assert pooled(plan)[2] == [(2, (1, 2, 3))]
    assert pooled(plan)[1] == pooled(plan)[0] == [(3, (1, 2, 3, 4))]


def test_a_mean_that_begins_before_the_tails_counts_what_is_shared_once_for_each():
    plan = planned([1, 2, 3, 4], [[1, 2, 3, 9, 9], [1, 2, 3, 8]], [0, 1, 2])
    (group,) = plan.shared
    assert group.prefix == TokenSequence([1, 2, 3], (Span(0, 0, 3), Span(1, 1, 3), Span(2, 2, 3)))
    assert group.tails == [
        TokenSequence([4], (Span(0, 0, 1),)),
        TokenSequence([9, 9], (Span(1, 0, 2),)),
        TokenSequence([8], (Span(2, 0, 1),)),
    ]


def test_a_part_of_a_row_has_the_parts_of_its_spans_that_lie_within():
    spans = tuple(Span(k, *edges) for k, edges in enumerate([(0, 6), (0, 2), (1, 3), (3, 6)]))
    row = TokenSequence([1, 2, 3, 4, 5, 6], spans)
    assert within(row, 2, 4) == TokenSequence([3, 4], (Span(0, 0, 2), Span(2, 0, 1), Span(3, 1, 2)))
    assert within(row, 0, 6) == row
    assert within(row, 4, 6).spans == (Span(0, 0, 2), Span(3, 0, 2))


def test_a_group_without_rows_is_its_prompt():
    plan = planned([1, 2], [], [1])
    assert plan.sequences == [TokenSequence([1, 2], (Span(0, 1, 2),))]
    assert plan.shared == []


# What is too long.


def test_a_prompt_that_was_cut_is_still_shared_and_ends_as_before(causal_tokenizer):
    planner = chat_planner(causal_tokenizer)
    plan = planner.plan([PromptGroup(LONG, ["One.", "Two.", "Three."])], **CAUSAL)
    (group,) = plan.shared
    whole = chat_ids(causal_tokenizer, LONG, add_generation_prompt=True)
    assert len(whole) > 100
    assert group.prefix.ids == whole[:32] + whole[-32:]
    texts = [causal_tokenizer.decode(tail.ids) for tail in group.tails]
    assert texts == ["One.<|turn|>", "Two.<|turn|>", "Three.<|turn|>"]
    assert plan.truncated == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2.5", "mistral-v0.3", "phi3"])
def test_a_response_that_was_cut_keeps_what_closes_it(name):
    like = family(name)
    planner = chat_planner(like.tokenizer, max_tokens=80)
    plan = planner.plan([PromptGroup(EGG, [ENDLESS, "Put it in."])], **CAUSAL)
    assert plan.truncated == {1}
    (ids, _, _) = reads(plan, causal=True)[1][0]
    assert len(ids) == 80
    closing = like.encode(like.closing)
    assert ids[-len(closing) :] == closing
    assert reads(plan, causal=True)[2][0][0][-len(closing) :] == closing
    full = chat_ids(like.tokenizer, (*EGG, Message("assistant", ENDLESS)))
    assert ids == full[: 80 - len(closing)] + closing


def test_only_what_was_cut_is_marked(causal_tokenizer):
    planner = chat_planner(causal_tokenizer)
    groups = [
        PromptGroup(EGG, ["No.", ENDLESS]),
        PromptGroup(LONG, ["Yes."]),
        PromptGroup(FOX, [ENDLESS, "Lazy."]),
    ]
    assert planner.plan(groups, **CAUSAL).truncated == {1, 3 + 1, 3 + 2, 3 + 3}


KINDS = pytest.mark.parametrize("kind", ["encoder", "causal"])


def fitting(planner, group):
    """The limits at which nothing of a group is cut, to the token."""
    if planner.spec.pooling == "last":
        prompts, rows, _ = slow_chat(planner, [group])
        return len(prompts[0][0]), len(rows[0][0])
    prompts, rows, _ = slow_encoder(planner, [group])
    return len(prompts[0][0]) - 2, len(rows[0][0])


@KINDS
@pytest.mark.parametrize("on_overlong", ["truncate", "error", "skip"])
def test_a_text_that_just_fits_is_left_whole(request, kind, on_overlong):
    group = PromptGroup(FOX, ["It is lazy.\n\n- It sleeps.\n- It is **safe**."])
    loose = planner_of(kind, request, max_tokens=400, max_prompt_tokens=300)
    prompt, whole = fitting(loose, group)

    def plan(**limits):
        planner = planner_of(kind, request, on_overlong=on_overlong, **limits)
        return planner.plan([group], causal=kind == "causal", share=True)

    limits = {"max_prompt_tokens": prompt, "max_tokens": whole}
    exact = plan(**limits)
    assert (exact.truncated, exact.missing) == (set(), set())
    for tighter, cut in (
        ({"max_prompt_tokens": prompt - 1}, {0, 1}),
        ({"max_tokens": whole - 1}, {1}),
    ):
        if on_overlong == "error":
            with pytest.raises(BackboneError, match="tokens"):
                plan(**{**limits, **tighter})
        elif on_overlong == "skip":
            assert plan(**{**limits, **tighter}).missing == cut
        else:
            assert plan(**{**limits, **tighter}).truncated == cut


@KINDS
@pytest.mark.parametrize(
    ("groups", "message", "group", "response"),
    [
        (
            [(EGG, ["No."]), (LONG, ["Yes."])],
            r"the prompt has \d+ tokens, 64 fit; raise `max_prompt_tokens` or set `on_overlong`",
            1,
            None,
        ),
        (
            [(EGG, ["No."]), (EGG, ["No.", ENDLESS])],
            r"the response has \d+ tokens, \d+ fit; raise `max_tokens` or set `on_overlong`",
            1,
            1,
        ),
        ([(LONG, [])], "the prompt has", 0, None),
        ([(EGG, [ENDLESS])], "the response has", 0, 0),
    ],
)
def test_an_overlong_text_is_an_error_that_names_it_when_asked(
    request, kind, groups, message, group, response
):
    planner = planner_of(kind, request, on_overlong="error")
    with pytest.raises(BackboneError, match=message) as caught:
        planner.plan([PromptGroup(*g) for g in groups], causal=kind == "causal", share=True)
    assert (caught.value.group, caught.value.response) == (group, response)


@KINDS
def test_an_overlong_text_is_left_out_when_asked_and_nothing_else(request, kind):
    planner = planner_of(kind, request, on_overlong="skip")
    groups = [
        PromptGroup(EGG, ["No.", ENDLESS, "Yes."]),
        PromptGroup(LONG, ["Yes.", ENDLESS]),
        PromptGroup(FOX, []),
        PromptGroup(FOX, ["Lazy."]),
    ]
    plan = planner.plan(groups, causal=kind == "causal", share=True)
    left_out = {1, 4 + 1, 4 + 3, 4 + 4}
    assert plan.missing == left_out
    assert plan.truncated == set()
    assert set(reads(plan, causal=kind == "causal")) == set(range(plan.targets)) - left_out
    # What is left is read as if the others had never been there.
    alone = planner.plan([PromptGroup(EGG, ["No.", "Yes."])], causal=kind == "causal", share=True)
    left, right = (reads(each, causal=kind == "causal") for each in (plan, alone))
    assert [left[0], left[4], left[6]] == [right[0], right[1], right[2]]


# Windows.


def windows_of(encoder, group, **limits):
    planner = encoder_planner(encoder.tokenizer, on_overlong="windows", **limits)
    plan = planner.plan([group], causal=False, share=True)
    return plan, reads(plan, causal=False)


@given(drafts=drafts())
def test_what_fits_is_read_in_windows_as_without(encoder, drafts):
    limits = {"max_tokens": 500, "max_prompt_tokens": 250}
    groups = groups_of(drafts)
    plans = [
        encoder_planner(encoder.tokenizer, on_overlong=choice, **limits).plan(
            groups, causal=False, share=False
        )
        for choice in ("windows", "truncate")
    ]
    assert plans[0] == plans[1]


@given(response=words(1, 60), limit=st.integers(30, 60))
def test_windows_hold_each_token_of_a_response_once(encoder, response, limit):
    tokenizer = encoder.tokenizer
    limits = {"max_tokens": limit, "max_prompt_tokens": 12}
    plan, found = windows_of(encoder, PromptGroup(EGG, [response]), **limits)
    context = tokenizer(EGG[0].content, add_special_tokens=False)["input_ids"]
    context = [tokenizer.cls_token_id, *middle_out(context, 12), tokenizer.sep_token_id]
    whole = []
    for ids, start, end in found[1]:
        assert len(ids) <= limit
        assert ids[:start] == context
        assert end == len(ids)
        assert ids[-1] == tokenizer.sep_token_id
        whole += ids[start:-1]
    assert whole == tokenizer(response, add_special_tokens=False)["input_ids"]
    # As few as possible, and of about one length.
    room = limit - len(context) - 1
    assert len(found[1]) == max(1, -(-len(whole) // room))
    sizes = [end - start for _, start, end in found[1]]
    assert max(sizes) - min(sizes) <= 1
    assert plan.missing == set()


@given(prompt=words(1, 60), limit=st.integers(30, 60))
def test_windows_hold_each_token_of_a_prompt_once(encoder, prompt, limit):
    tokenizer = encoder.tokenizer
    group = PromptGroup((Message("user", prompt),), [])
    plan, found = windows_of(encoder, group, max_tokens=limit, max_prompt_tokens=12)
    whole = []
    for ids, start, end in found[0]:
        assert len(ids) <= limit
        assert (start, end) == (0, len(ids))
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        whole += ids[1:-1]
    assert whole == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert len(found[0]) == -(-len(whole) // (limit - 2))
    assert (plan.truncated, plan.missing) == (set(), set())


def test_a_text_that_just_fits_is_one_window(encoder):
    ids = encoder.tokenizer(LONG[0].content, add_special_tokens=False)["input_ids"]
    groups = PromptGroup(LONG, []), PromptGroup((Message("user", ""),), [LONG[0].content])
    for group, target, special in ((groups[0], 0, 2), (groups[1], 1, 3)):
        for spare, windows in ((0, 1), (-1, 2)):
            limits = {"max_tokens": len(ids) + special + spare, "max_prompt_tokens": 12}
            _, found = windows_of(encoder, group, **limits)
            assert len(found[target]) == windows


def test_a_prompt_in_windows_is_whole_but_beside_a_response_it_is_cut(encoder):
    tokenizer = encoder.tokenizer
    plan, found = windows_of(encoder, PromptGroup(LONG, ["No.", "Yes."]))
    ids = tokenizer(LONG[0].content, add_special_tokens=False)["input_ids"]
    assert len(found[0]) == -(-len(ids) // 126)
    assert [token for row, _, _ in found[0] for token in row[1:-1]] == ids
    for row, start, end in found[0]:
        assert len(row) <= 128
        assert (start, end) == (0, len(row))
        assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert found[1][0][0][1:65] == middle_out(ids, 64)
    # The responses were read after less than the whole prompt; nothing of the prompt was lost.
    assert plan.truncated == {1, 2}


def test_windows_are_refused_with_a_chat_template(causal_tokenizer):
    with pytest.raises(BackboneError, match="`on_overlong: windows` needs an encoder"):
        chat_planner(causal_tokenizer, on_overlong="windows")


# What a tokenizer lacks, and what a template refuses.


def test_pooling_the_last_token_needs_a_chat_template(encoder, causal_tokenizer):
    bare = copy.deepcopy(causal_tokenizer)
    bare.chat_template = None
    for tokenizer in (encoder.tokenizer, bare):
        with pytest.raises(
            BackboneError, match=r"tiny has no chat template, which `pooling: last`"
        ):
            chat_planner(tokenizer)


@pytest.mark.parametrize("name", ["cls_token", "sep_token"])
def test_without_a_template_an_encoder_needs_its_special_tokens(encoder, name):
    tokenizer = copy.deepcopy(encoder.tokenizer)
    setattr(tokenizer, name, None)
    with pytest.raises(BackboneError, match="neither a chat template nor the CLS and SEP tokens"):
        encoder_planner(tokenizer)


def test_a_tokenizer_that_cannot_tell_where_the_prompt_ends_is_a_backbone_error(causal_tokenizer):
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.chat_template = {"one": "a", "two": "b"}
    with pytest.raises(BackboneError, match=r"tiny: .*no chat template, or no default one"):
        chat_planner(tokenizer)


def test_what_the_template_refuses_is_named(causal_tokenizer):
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'zebra' in message['content'] %}"
        "{{ raise_exception('No zebras') }}{% endif %}{% endfor %}" + tokenizer.chat_template
    )
    planner = chat_planner(tokenizer)
    zebra = (Message("user", "A zebra?"),)
    for groups, place in (
        ([PromptGroup(EGG, ["No."]), PromptGroup(zebra, [])], (1, None)),
        ([PromptGroup(EGG, ["No."]), PromptGroup(FOX, ["No.", "A zebra."])], (1, 1)),
    ):
        with pytest.raises(BackboneError, match="No zebras") as caught:
            planner.plan(groups, **CAUSAL)
        assert (caught.value.group, caught.value.response) == place


# Responses that are nothing.


@KINDS
def test_a_response_that_tokenises_to_nothing_is_read_by_what_closes_it(request, kind):
    planner = planner_of(kind, request)
    group = PromptGroup(EGG, ["", "No."])
    plan = planner.plan([group], causal=kind == "causal", share=True)
    expected, _ = expected_of((slow_chat if kind == "causal" else slow_encoder)(planner, [group]))
    assert reads(plan, causal=kind == "causal") == expected


# Nothing closes a response here, so that an empty one adds nothing to its prompt.
UNCLOSED = (
    "{% for message in messages %}<|start|>{{ message['role'] }}<|end|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)


def test_a_response_of_no_tokens_at_all_ends_where_the_prompt_does(causal_tokenizer):
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.chat_template = UNCLOSED
    plan = chat_planner(tokenizer).plan([PromptGroup(EGG, ["No.", ""])], **CAUSAL)
    found = reads(plan, causal=True)
    assert found[2] == found[0] != found[1]


def test_the_mean_over_a_response_of_no_tokens_is_an_error_that_names_it(causal_tokenizer):
    tokenizer = copy.deepcopy(causal_tokenizer)
    tokenizer.chat_template = UNCLOSED
    planner = chat_planner(tokenizer, pooling="mean")
    planner.plan([PromptGroup(EGG, ["No."])], **CAUSAL)
    with pytest.raises(BackboneError, match="no tokens") as caught:
        planner.plan([PromptGroup(FOX, ["No."]), PromptGroup(EGG, ["No.", ""])], **CAUSAL)
    assert (caught.value.group, caught.value.response) == (1, 1)


# The tokenizer's own settings.


def test_settings_of_the_tokenizer_itself_change_nothing(encoder, causal_tokenizer):
    groups = [PromptGroup(FOX, ["Lazy.", "It sleeps."]), PromptGroup(EGG, ["No."])]
    for tokenizer in (encoder.tokenizer, causal_tokenizer):
        changed = copy.deepcopy(tokenizer)
        changed.padding_side = changed.truncation_side = "left"
        changed.model_max_length = 4
        changed.backend_tokenizer.enable_truncation(max_length=5)
        changed.backend_tokenizer.enable_padding(length=30)
        if changed.chat_template:
            changed.pad_token = None
        pooling = "last" if changed.chat_template else "mean"
        plans = [
            chat_planner(each, pooling=pooling).plan(groups, causal=True, share=True)
            for each in (tokenizer, changed)
        ]
        assert plans[0] == plans[1]


def test_a_plan_compares_by_what_it_holds(causal_tokenizer):
    planner = chat_planner(causal_tokenizer)
    plan = planner.plan([PromptGroup(EGG, ["No.", "Yes."])], **CAUSAL)
    assert plan == planner.plan([PromptGroup(EGG, ["No.", "Yes."])], **CAUSAL)
    assert plan != planner.plan([PromptGroup(EGG, ["No.", "No."])], **CAUSAL)
    assert dataclasses.replace(plan, missing={1}) != plan
