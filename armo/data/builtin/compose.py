"""Compose the built-in corpus from its hand-written pieces.

`content/*.toml` holds, per prompt, pieces of text whose nature is known: points of a good answer,
evasions, honest limits, false claims, cautions, reckless remarks, refusals, each in a short and a
long form that say the same. A response is a choice of pieces and a style, so its ratings are true
by construction, and two responses can differ in style alone.

`python -m armo.data.builtin.compose` writes the three files again; a test compares them.
"""

import gzip
import io
import json
import math
import random
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from armo.data.surface import SURFACE_FEATURES, surface_features

FOLDER = Path(__file__).parent
SOURCE = "armo-builtin"
SEED = 20261121
COMPARED_PER_PROMPT = 4
COMPARED_WORDS = (80, 210)
COMPARED_DRAWS = 5
PAIRS_PER_PROMPT = 4
LEAST_MARGIN = 0.5

# How much each objective counts for a preference, by kind of prompt. A wrong fact does its harm
# whatever else the answer offers; invention is no fault in a caption; advice and hands-on tasks
# can hurt people; on a sensitive prompt safety comes first.
PREFERENCE_WEIGHTS = {
    "factual": {"helpfulness": 0.25, "honesty": 0.65, "safety": 0.10},
    "how_to": {"helpfulness": 0.45, "honesty": 0.10, "safety": 0.45},
    "code": {"helpfulness": 0.75, "honesty": 0.15, "safety": 0.10},
    "writing": {"helpfulness": 0.80, "honesty": 0.10, "safety": 0.10},
    "advice": {"helpfulness": 0.20, "honesty": 0.40, "safety": 0.40},
    "safety": {"helpfulness": 0.20, "honesty": 0.10, "safety": 0.70},
}

QUALITY = ("helpfulness", "honesty", "safety")
DEVICES = ("heading", "bullets", "bold", "links", "emoji", "exclamation")
# Counterfactual pairs take turns over these; length, the commonest bias, has every third turn.
PATTERNS = (
    "length",
    "heading",
    "bullets",
    "length",
    "bold",
    "links",
    "length",
    "emoji",
    "exclamation",
)

# Sentences without content, [short, long], that bring every response to the same number of
# pieces: how much a response says must not follow from how good it is.
NEUTRAL = (
    (
        "That is what I have to say to your message, and I leave the rest to you.",
        "With that I have come to the end of what I have to say in reply to the message that you "
        "sent me, and the rest of it is something that I leave to you.",
    ),
    (
        "Here is my reply to what you wrote, put down in the order in which it came.",
        "What follows here is the reply that I have put together to what you wrote just now, and "
        "it is put down in the same order in which it all came to mind.",
    ),
    (
        "Thank you for the message, which I have read from its first word to its last.",
        "Thank you for having taken the time to write this message and for sending it to me, all "
        "of which I have read with care from its first word to its last.",
    ),
    (
        "Read these lines at your own pace, and come back to them whenever you like.",
        "Please feel free to read all of these lines at a pace that is your own, and to come back "
        "to any of them later on, whenever it is that you feel like doing so.",
    ),
    (
        "My answer stands in the lines here, in plain words and without any detours.",
        "The answer that I have for you can be found in the lines that stand here, written in "
        "words as plain as I could make them and without any detours on the way.",
    ),
    (
        "You asked about this, so let me reply to it as I would to a friend.",
        "Since this is the thing that you have asked me about, let me go ahead and give you a "
        "reply to it in just the way in which I would reply to a friend.",
    ),
    (
        "As far as your message goes, this is all there is from my side for now.",
        "As far as the message that you have sent to me is concerned, this here is all that there "
        "is to be had from my side of the conversation for the time being.",
    ),
)
PIECES = 6
EMOJI = ("😀", "👍", "✨", "🎉", "🙂", "🌟", "💡", "🚀")

# The surface features that the corpus is balanced over, with the typical spread of each within a
# prompt, so that none outweighs the others. Lines and paragraphs follow from these; inline code is
# content here, since only an answer to a question about code quotes any.
BALANCED = {
    "log_length": 0.3,
    "list_items": 2.0,
    "bold": 2.0,
    "headings": 0.5,
    "links": 2.0,
    "code_blocks": 0.5,
    "tables": 0.5,
    "emoji": 2.0,
    "exclamations": 3.0,
    "affirmative": 0.5,
}
SURFACE_UNITS = torch.tensor(list(BALANCED.values()))

MARK = re.compile(r"<<(.+?)>>")


@dataclass(frozen=True, slots=True)
class Acts:
    """What a response does, style apart.

    Attributes:
        base: `full` answer; `half` of it, then evasive; `vague` evasion; needless `refusal`, then
            evasive; or eager to `comply` with a harmful request.
        claims: -2 or -1 false claims, 0, or 1 honest note of limits.
        risk: -2 or -1 reckless remarks, 0, or 1 caution.
    """

    base: str
    claims: int = 0
    risk: int = 0


@dataclass(frozen=True, slots=True)
class Style:
    """How a response is put, content apart.

    Attributes:
        verbosity: 0, all pieces short, to 4, all long.
        devices: Which of `DEVICES` are used.
    """

    verbosity: int
    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Composed:
    """A response, what is true of it, and how it looks: its features, as in `BALANCED`."""

    text: str
    ratings: dict[str, float]
    surface: tuple[float, ...]


def load_content(folder: Path = FOLDER / "content") -> list[dict[str, Any]]:
    """Read the hand-written prompts with their pieces, each with its kind, in file order."""
    prompts = []
    for file in sorted(folder.glob("*.toml")):
        kind = file.stem.rpartition("_")[0]
        for prompt in tomllib.loads(file.read_text(encoding="utf-8"))["prompt"]:
            prompts.append({**prompt, "kind": kind})
    return prompts


def compose() -> dict[str, list[dict[str, Any]]]:
    """Compose all rows of the corpus, by file name."""
    prompts = load_content()
    split = _splits(prompts)
    ratings: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    counterfactuals: list[dict[str, Any]] = []
    imbalance: dict[tuple[str, str], torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for number, prompt in enumerate(prompts):
        rng = random.Random(f"{SEED}:{prompt['id']}")
        messages = [{"role": "user", "content": prompt["text"]}]
        side = split[prompt["id"]]
        common = {"source": SOURCE, "category": prompt["kind"], "split": side}
        rated, compared = _acts(prompt, rng)
        # Raters' favourites tend to be long and formatted, so heads learn style along with
        # quality: rated responses are like that. Compared ones have styles of their own.
        for k, acts in enumerate(rated):
            response = _respond(prompt, acts, rng, confounded=True)
            ratings.append(
                {
                    "id": f"{prompt['id']}-r{k}",
                    **common,
                    "messages": [*messages, {"role": "assistant", "content": response.text}],
                    "ratings": _leave_some_missing(response.ratings, rng),
                }
            )
        responses = _compared(prompt, compared, rng, moments.setdefault(side, _no_moments()))
        for k, response in enumerate(responses):
            ratings.append(
                {
                    "id": f"{prompt['id']}-s{k}",
                    **common,
                    "messages": [*messages, {"role": "assistant", "content": response.text}],
                    "ratings": {n: response.ratings[n] for n in ("honesty", "safety")},
                }
            )
        key = (prompt["kind"], side)
        imbalance.setdefault(key, torch.zeros(len(SURFACE_UNITS) + 2))
        for k, (chosen, rejected, margin) in enumerate(
            _pairs(prompt["kind"], responses, imbalance[key])
        ):
            preferences.append(
                {
                    "id": f"{prompt['id']}-p{k}",
                    **common,
                    "prompt": messages,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "margin": round(margin, 2),
                }
            )
        pattern = PATTERNS[number % len(PATTERNS)]
        if pattern == "bullets" and prompt["kind"] == "writing":
            pattern = "length"
        plain, styled = _counterfactual(prompt, pattern, rng)
        counterfactuals.append(
            {
                "id": f"{prompt['id']}-c",
                **common,
                "category": pattern,
                "prompt": messages,
                "responses": [plain, styled],
                "correct": [0, 1],
            }
        )
    return {
        "ratings.jsonl.gz": ratings,
        "preferences.jsonl.gz": preferences,
        "counterfactuals.jsonl.gz": counterfactuals,
    }


def compose_candidates(
    count: int, *, prompts_per_kind: int | None = None
) -> Iterator[tuple[dict[str, Any], list[Composed]]]:
    """Compose many responses to each test prompt, to choose the best of: none is in the files.

    What a response does and how it is put are drawn independently of each other: each kind of
    answer, with any false claims and any reckless remarks, in any style and at any length. No two
    texts of a prompt are the same.

    Args:
        count: Responses per prompt.
        prompts_per_kind: How many test prompts of each kind, the first ones; all of them, if None.

    Yields:
        Each prompt with its responses, in the order of the files.
    """
    prompts = load_content()
    split = _splits(prompts)
    taken = dict.fromkeys(PREFERENCE_WEIGHTS, 0)
    for prompt in prompts:
        if split[prompt["id"]] != "test" or taken[prompt["kind"]] == prompts_per_kind:
            continue
        taken[prompt["kind"]] += 1
        rng = random.Random(f"{SEED}:{prompt['id']}:candidates")
        bases = ["full", "half", "vague"]
        if prompt.get("harmful"):
            bases.append("comply")
        elif "snippet" not in prompt:  # see `_acts`
            bases.append("refusal")
        composed: dict[str, Composed] = {}
        while len(composed) < count:
            acts = Acts(rng.choice(bases), rng.randint(-2, 1), rng.randint(-2, 1))
            response = _respond(prompt, acts, rng, confounded=False)
            composed.setdefault(response.text, response)
        yield prompt, list(composed.values())


def utility(kind: str, ratings: Mapping[str, float]) -> float:
    """How good a response is on the whole, on [0, 1]: what preferences are made by."""
    weighted = sum(weight * ratings[name] for name, weight in PREFERENCE_WEIGHTS[kind].items())
    return (weighted - 1.0) / 4.0


def render(prompt: dict[str, Any], acts: Acts, style: Style, rng: random.Random) -> str:
    """Put the pieces of a response together in a style."""
    writing = prompt["kind"] == "writing"
    long_share = style.verbosity / 4

    def form(pieces: Sequence[Sequence[str]]) -> list[str]:
        longs = round(long_share * len(pieces))
        chosen = set(rng.sample(range(len(pieces)), longs))
        return [piece[1] if k in chosen else piece[0] for k, piece in enumerate(pieces)]

    base = form(_base_pieces(prompt, acts.base))
    before: list[list[str]] = []
    after: list[list[str]] = []
    extras = prompt["overclaims"][: max(0, -acts.claims)] + prompt["reckless"][: max(0, -acts.risk)]
    if acts.claims > 0:
        extras.append(prompt["limits"])
    if acts.risk > 0:
        extras.append(prompt["careful"])
    extras += rng.sample(NEUTRAL, max(0, PIECES - len(base) - len(extras)))
    for extra in rng.sample(extras, len(extras)):
        # Remarks on a piece of writing come after it.
        (after if writing or rng.random() < 0.7 else before).append(extra)
    lead, tail = form(before), form(after)
    marked = _mark(base, style.devices)
    lead, tail = (_mark(part, style.devices) for part in (lead, tail))
    if "exclamation" in style.devices:
        lead, marked, tail = (_exclaim(part) for part in (lead, marked, tail))
    if "emoji" in style.devices:
        marked = [f"{piece} {rng.choice(EMOJI)}" for piece in marked]
    bullets = "bullets" in style.devices and not writing
    body = "\n".join(f"- {piece}" for piece in marked) if bullets else " ".join(marked)
    blocks = [" ".join(lead), body, _code(prompt, acts.base), " ".join(tail)]
    if "heading" in style.devices:
        blocks.insert(0, f"## {prompt['title']}")
    return "\n\n".join(block for block in blocks if block)


def rate(acts: Acts, style: Style, *, harmful: bool) -> dict[str, float]:
    """Rate a response by what was done to it.

    Quality is on 1 to 5. Helpfulness: the share of a good answer that is there; for a harmful
    request a good answer is a refusal that says why and what would help. Honesty: false claims
    lower it, a note of limits raises it. Safety: reckless remarks lower it, a caution raises it.
    The bias objectives are on 0 to 4 and describe the style.
    """
    helpfulness = {"full": 5.0, "half": 3.0, "vague": 2.0, "refusal": 1.0, "comply": 1.0}
    honesty = {-2: 1.0, -1: 2.0, 0: 4.0, 1: 5.0}
    safety = {-2: 1.0, -1: 2.0, 0: 4.0, 1: 5.0}
    if acts.base == "comply":
        safe = 1.0
    elif harmful:
        safe = 5.0
    else:
        safe = safety[acts.risk]
    return {
        "helpfulness": helpfulness[acts.base],
        "honesty": honesty[acts.claims],
        "safety": safe,
        "verbosity": float(style.verbosity),
        "formatting": float(min(4, len(style.devices))),
    }


def _acts(prompt: dict[str, Any], rng: random.Random) -> tuple[list[Acts], list[Acts]]:
    """Draw what the rated responses do, and what the compared ones do."""
    if prompt.get("harmful"):
        menu = [
            Acts("full", 1, 1),
            Acts("full", rng.choice((0, 1))),
            Acts("half", 0, rng.choice((0, 1))),
            Acts("vague", rng.choice((0, 1)), rng.choice((0, 1))),
            Acts("comply", -2, rng.choice((0, -2))),
            Acts("comply", rng.choice((0, -1)), -2),
        ]
        return [*menu[:4], rng.choice(menu[4:])], rng.sample(menu, COMPARED_PER_PROMPT)
    good = rng.choice((Acts("full", 1, 1), Acts("full", 1), Acts("full", 0, 1), Acts("full")))
    false = Acts("full", -2, rng.choice((0, 1)))
    reckless = Acts("full", rng.choice((0, 1)), -2)
    evasive = Acts("vague", 1, rng.choice((0, 1)))
    cautious = rng.choice((Acts("vague", 0, 1), Acts("vague", 1, 1), Acts("half", 0, 1)))
    poor = rng.choice(
        (
            Acts("half", -1),
            Acts("half", 0, -1),
            Acts("half", -2, 1),
            Acts("vague", -2),
            Acts("vague", 1, -2),
            Acts("half", 1),
        )
    )
    # A refusal has no code, which would tell it from the other answers to a question about code.
    refusal = Acts("vague" if "snippet" in prompt else "refusal", rng.choice((0, 1)))
    other = refusal if prompt.get("sounds_harmful") else rng.choice((good, poor, refusal))
    rated = [good, rng.choice((false, reckless)), evasive, poor, rng.choice((cautious, refusal))]
    return rated, [false, reckless, rng.choice((evasive, cautious)), other]


def _respond(
    prompt: dict[str, Any], acts: Acts, rng: random.Random, *, confounded: bool
) -> Composed:
    style = _style(acts if confounded else None, prompt["kind"], rng)
    text = render(prompt, acts, style, rng)
    if not confounded:
        # A length drawn without regard to the acts: some acts have longer pieces than others.
        words, seed = math.exp(rng.uniform(*map(math.log, COMPARED_WORDS))), rng.random()
        options = [Style(verbosity, style.devices) for verbosity in range(5)]
        texts = [render(prompt, acts, option, random.Random(seed)) for option in options]
        text, style = min(
            zip(texts, options, strict=True), key=lambda pair: abs(len(pair[0].split()) - words)
        )
    ratings = rate(acts, style, harmful=prompt.get("harmful", False))
    measured = dict(zip(SURFACE_FEATURES, surface_features([text])[0].tolist(), strict=True))
    return Composed(text, ratings, tuple(measured[name] for name in BALANCED))


def _compared(
    prompt: dict[str, Any], acts: Sequence[Acts], rng: random.Random, moments: torch.Tensor
) -> list[Composed]:
    """Respond in styles that, over all prompts so far, do not follow the quality.

    `moments` sums the products of quality and surface features, both as deviations from the
    prompt's mean. Of several draws of styles the one that keeps the sums nearest to zero is
    taken, so what a decorrelation learns from these responses is style alone.
    """
    best: tuple[float, list[Composed], torch.Tensor] | None = None
    for _ in range(COMPARED_DRAWS):
        responses = [_respond(prompt, act, rng, confounded=False) for act in acts]
        quality = torch.tensor([[r.ratings[name] for name in QUALITY] for r in responses])
        surface = torch.tensor([r.surface for r in responses]) / SURFACE_UNITS
        deviations = (quality - quality.mean(0)).T @ (surface - surface.mean(0))
        imbalance = float((moments + deviations).square().sum())
        if best is None or imbalance < best[0]:
            best = imbalance, responses, deviations
    assert best is not None
    moments += best[2]
    return best[1]


def _no_moments() -> torch.Tensor:
    return torch.zeros(len(QUALITY), len(SURFACE_UNITS))


def _style(acts: Acts | None, kind: str, rng: random.Random) -> Style:
    """Draw a style, at random or, for given acts, the richer the better the answer."""
    devices = [name for name in DEVICES if not (name == "bullets" and kind == "writing")]
    if acts is None:
        return Style(rng.randrange(5), frozenset(rng.sample(devices, rng.randrange(5))))
    middle = {"full": 3.7, "half": 2.0, "vague": 0.3, "refusal": 0.3, "comply": 0.3}[acts.base]
    verbosity, count = (min(4, max(0, round(rng.gauss(middle, 0.6)))) for _ in range(2))
    return Style(verbosity, frozenset(rng.sample(devices, count)))


def _pairs(
    kind: str, responses: Sequence[Composed], imbalance: torch.Tensor
) -> list[tuple[Composed, Composed, float]]:
    """Pick pairs whose preference is clear, so that style does not tell chosen from rejected.

    `imbalance` sums, over the pairs picked so far, each surface feature of the chosen minus that
    of the rejected response. Each pick keeps it near zero: then a logistic model of the surface
    features has its optimum at zero coefficients.
    """
    weights = PREFERENCE_WEIGHTS[kind]
    candidates = []
    for first, second in combinations(responses, 2):
        margin = sum(w * (first.ratings[k] - second.ratings[k]) for k, w in weights.items())
        if abs(margin) < LEAST_MARGIN:
            continue
        chosen, rejected = (first, second) if margin > 0 else (second, first)
        gains = [chosen.ratings[name] - rejected.ratings[name] for name in weights]
        difference = torch.tensor(chosen.surface) - torch.tensor(rejected.surface)
        scaled = difference / SURFACE_UNITS
        # Which one is longer, and which more formatted, matters beside by how much.
        signs = torch.stack([scaled[0].sign(), scaled[1:].sum().sign()])
        balance = torch.cat([scaled, signs])
        candidates.append((chosen, rejected, abs(margin), min(gains) < 0, balance))
    picked: list[tuple[Composed, Composed, float]] = []
    # Half of the pairs trade one objective for another: those are what a mix is tested by.
    for want_trade in [True, False] * (PAIRS_PER_PROMPT // 2):
        wanted = [c for c in candidates if c[3] == want_trade] or candidates
        if not wanted:
            break
        best = min(wanted, key=lambda c: float((imbalance + c[4]).square().sum()))
        candidates.remove(best)
        imbalance += best[4]
        picked.append(best[:3])
    return picked


def _counterfactual(prompt: dict[str, Any], pattern: str, rng: random.Random) -> tuple[str, str]:
    """Compose one response twice: plain, and with only the length or one device changed."""
    if prompt.get("harmful"):
        acts = rng.choice((Acts("full"), Acts("vague"), Acts("comply")))
    else:
        acts = rng.choice((Acts("full", 1), Acts("full"), Acts("vague", 0, 1), Acts("full", -1)))
    verbosity = rng.choice((0, 2, 4))
    seed = rng.random()

    def version(style: Style) -> str:
        return render(prompt, acts, style, random.Random(seed))

    if pattern == "length":
        return version(Style(0, frozenset())), version(Style(4, frozenset()))
    plain = version(Style(verbosity, frozenset()))
    if pattern == "heading":
        return f"{prompt['title']}\n\n{plain}", f"## {prompt['title']}\n\n{plain}"
    return plain, version(Style(verbosity, frozenset({pattern})))


def _base_pieces(prompt: dict[str, Any], base: str) -> list[list[str]]:
    pieces: dict[str, list[list[str]]] = {
        "full": prompt["points"],
        "half": [*prompt["points"][:2], *prompt["vague"][:2]],
        "vague": prompt["vague"],
    }
    if base == "refusal":
        return [prompt["refusal"], *prompt["vague"][:2]]
    return prompt["comply"] if base == "comply" else pieces[base]


def _code(prompt: dict[str, Any], base: str) -> str:
    if "snippet" not in prompt:
        return ""
    code = prompt["snippet" if base in ("full", "half") else "stub"].strip("\n")
    return f"```{prompt['language']}\n{code}\n```"


def _mark(pieces: Sequence[str], devices: frozenset[str]) -> list[str]:
    """Set the key phrases bold, and link the first one of each block, as devices say."""
    marked = []
    for k, piece in enumerate(pieces):
        if "links" in devices and k == 0:
            piece = MARK.sub(r"[\1](https://example.org)", piece)
        elif "bold" in devices:
            piece = MARK.sub(r"**\1**", piece)
        marked.append(MARK.sub(r"\1", piece))
    return marked


def _exclaim(pieces: Sequence[str]) -> list[str]:
    return [piece[:-1] + "!" if piece.endswith(".") else piece for piece in pieces]


def _leave_some_missing(ratings: dict[str, float], rng: random.Random) -> dict[str, float]:
    kept = {name: rating for name, rating in ratings.items() if rng.random() >= 0.12}
    return kept or ratings


def _splits(prompts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Put a quarter of the prompts of each kind on the test side."""
    split = {}
    for kind in sorted({prompt["kind"] for prompt in prompts}):
        ids = sorted(prompt["id"] for prompt in prompts if prompt["kind"] == kind)
        random.Random(f"{SEED}:{kind}").shuffle(ids)
        split.update({id: "test" if k % 4 == 0 else "train" for k, id in enumerate(ids)})
    return split


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write gzipped JSON Lines whose bytes depend on the rows alone."""
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    path.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    for name, rows in compose().items():
        write_rows(FOLDER / name, rows)
        print(f"{name}: {len(rows)} rows")
