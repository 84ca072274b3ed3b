"""A clean data set, composed here, and one fault of each kind to plant in it."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

OBJECTIVES = {
    "helpfulness": {"low": 1, "high": 5},
    "honesty": {"low": 1, "high": 5},
    "clarity": {"low": 0, "high": 10},
    "verbosity": {"low": 0, "high": 4, "bias": True},
}
PRAISED = ("precisely", "evidence", "carefully", "because", "example", "therefore")
BLAMED = ("whatever", "somehow", "obviously", "dunno", "stuff", "maybe")
RATED_PROMPTS, PAIRED_PROMPTS, LISTED_PROMPTS = 120, 300, 30


def _word(rng):
    """A word that says nothing, out of 27,000."""
    return "".join(
        rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))
    )


def text(rng, words, *, of=()):
    """A sentence of random words, some of them `of` those given."""
    drawn = [rng.choice(of) if of and rng.random() < 0.2 else _word(rng) for _ in range(words)]
    return " ".join(drawn).capitalize() + "."


def turns(prompt, response=None):
    messages = [{"role": "user", "content": prompt}]
    return messages + ([] if response is None else [{"role": "assistant", "content": response}])


def clean_rows(seed=0):
    """Ratings, pairs and lists of which nothing is wrong: rows by kind."""
    rng = random.Random(seed)
    rows = {"ratings": [], "pairs": [], "lists": []}
    for number in range(RATED_PROMPTS):
        prompt = text(rng, 14)
        for k in range(2):
            quality, said = rng.random(), text(rng, rng.randrange(20, 40))
            ratings = {
                name: min(5, max(1, round(1 + 4 * quality + rng.gauss(0, 0.8))))
                for name in ("helpfulness", "honesty")
            }
            ratings["clarity"] = min(10, max(0, round(10 * quality + rng.gauss(0, 2))))
            ratings["verbosity"] = (len(said.split()) - 20) // 4
            row = {"id": f"r{number}-{k}", "source": "raters", "ratings": ratings}
            rows["ratings"].append({**row, "messages": turns(prompt, said)})
    for number in range(PAIRED_PROMPTS):
        sides = {
            name: text(rng, rng.randrange(20, 40), of=words)
            for name, words in (("chosen", PRAISED), ("rejected", BLAMED))
        }
        row = {"id": f"p{number}", "source": "judges", "prompt": turns(text(rng, 14))}
        rows["pairs"].append({**row, **sides})
    for number in range(LISTED_PROMPTS):
        row = {"id": f"l{number}", "source": "rankers", "prompt": turns(text(rng, 14))}
        row |= {"responses": [text(rng, 30) for _ in range(3)], "ranks": [1, 2, 3]}
        rows["lists"].append(row)
    return rows


def write_sets(folder, rows):
    """Write rows to `ratings.jsonl` and so on; a string is a line as it is."""
    paths = {}
    for kind, those in rows.items():
        paths[kind] = Path(folder) / f"{kind}.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in those]
        paths[kind].write_text("".join(f"{line}\n" for line in lines))
    return {kind: str(path) for kind, path in paths.items()}


@dataclass
class Fault:
    """A fault, and the finding that it must give.

    `plant` changes the rows and returns where it did so, as `ratings:3 field`, in the order in
    which the finding names them.
    """

    severity: str
    check: str
    statement: str
    plant: object
    probe: bool = False


def _bad_rating(rows):
    rows["ratings"][6]["ratings"]["honesty"] = 6
    return ["ratings:7: rating 6 of 'honesty' is outside its scale 1 to 5"]


def _broken_line(rows):
    rows["pairs"][3] = '{"id": "p3", "source": "judges", "prompt": ['
    return ["pairs:4: malformed JSON"]


def _two_sides(rows):
    rows["ratings"][8]["split"] = "train"
    rows["ratings"][9]["split"] = "test"
    return ["ratings:9 (train) and", "ratings:10 (test)"]


def _same_side(rows, kind, changed, side="train"):
    """Put one word more into a prompt of another row, and both rows on known sides."""
    for number, split in ((2, "train"), (4, side)):
        rows[kind][number]["split"] = split
    prompt = rows[kind][2]["prompt"][0]["content"]
    rows[kind][4]["prompt"] = turns(changed(prompt))
    return [f"{kind}:5 and", f"{kind}:3 (similarity"]


def _near_prompt_leaks(rows):
    return _same_side(rows, "lists", lambda prompt: f"{prompt} Please!", side="test")


def _near_prompts(rows):
    return _same_side(rows, "lists", lambda prompt: prompt.upper().replace(".", "?!") + " Now")


def _repeat(rows):
    rows["ratings"].append({**rows["ratings"][4], "id": "again"})
    return [f"ratings:{len(rows['ratings'])} and", "ratings:5"]


def _repeated_pair(rows):
    rows["pairs"].append(
        {**rows["pairs"][4], "id": "again", "chosen": rows["pairs"][4]["chosen"] + " "}
    )
    return [f"pairs:{len(rows['pairs'])} and", "pairs:5"]


def _repeated_list(rows):
    rows["lists"].append({**rows["lists"][4], "id": "again"})
    return [f"lists:{len(rows['lists'])} and", "lists:5"]


def _two_minds(rows):
    ratings = {"honesty": 1 if rows["ratings"][4]["ratings"]["honesty"] > 2 else 5}
    rows["ratings"].append({**rows["ratings"][4], "id": "again", "ratings": ratings})
    return [f"ratings:{len(rows['ratings'])} and", "ratings:5 `ratings`"]


def _both_ways(rows):
    old = rows["pairs"][4]
    turned = {"chosen": old["rejected"], "rejected": old["chosen"]}
    rows["pairs"].append({**old, "id": "turned", **turned})
    return ["pairs:5 and", f"pairs:{len(rows['pairs'])}"]


def _circle(rows):
    """A list says a over b over c, a pair c over a."""
    old = rows["lists"][4]
    a, _, c = old["responses"]
    pair = {"id": "c", "source": "judges", "prompt": old["prompt"], "chosen": c, "rejected": a}
    rows["pairs"].append(pair)
    return [f"pairs:{len(rows['pairs'])} and", "lists:5"]


FLIPPED = range(5, PAIRED_PROMPTS, 20)


def _flipped(rows):
    for number in FLIPPED:
        row = rows["pairs"][number]
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return ["pairs:"]


def _in_text(kind, field, piece, place):
    def plant(rows):
        row = rows[kind][5]
        if field == "messages":
            row["messages"][1]["content"] += piece
        else:
            row[field] += piece
        return [place]

    return plant


def _near_response(rows):
    chosen = rows["pairs"][4]["chosen"]
    row = {"id": "n", "source": "rankers", "prompt": rows["pairs"][4]["prompt"], "ranks": [2, 1]}
    rows["lists"].append(
        {**row, "responses": [chosen.replace(".", ", yes!"), "Quite another one."]}
    )
    return [f"lists:{len(rows['lists'])} `responses[0]` and", "pairs:5 `chosen` (similarity 0.9"]


def _boilerplate(rows):
    for number in range(0, 60, 2):
        rows["ratings"][number]["messages"][1]["content"] = "I cannot help you with that, sorry."
    return ["ratings:1 `messages` (30 prompts)"]


def _constant(rows):
    for row in rows["ratings"]:
        row["ratings"]["clarity"] = 7
    return []


def _nearly_constant(rows):
    for row in rows["ratings"][2:]:
        row["ratings"]["clarity"] = 7
    return []


def _narrow(rows):
    for row in rows["ratings"]:
        row["ratings"]["clarity"] /= 10
    return []


def _few(rows):
    for row in rows["ratings"][7:]:
        del row["ratings"]["clarity"]
    return []


def _alike(rows):
    for row in rows["ratings"]:
        row["ratings"]["clarity"] = 2 * row["ratings"]["honesty"]
    return []


def _reversed(rows):
    for row in rows["ratings"]:
        row["ratings"]["clarity"] = 10 - row["ratings"]["clarity"]
    return []


def _long_is_good(rows):
    rng = random.Random(1)
    for row in rows["ratings"]:
        words = len(row["messages"][1]["content"].split())
        row["ratings"]["clarity"] = min(10, max(0, round((words - 20) / 2 + rng.gauss(0, 1))))
    return []


def _long_is_chosen(rows):
    rng = random.Random(1)
    for row in rows["pairs"]:
        row["chosen"] += " " + text(rng, 20)
    return []


MANY = "Which river crosses the old town where the bridge with nine arches was built long ago?"


def _contaminated(rows):
    rows["pairs"][7]["prompt"] = turns(f"Answer briefly. {MANY.upper()}")
    return ["pairs:8 `prompt[0].content` has the prompt of 'b0'"]


BENCHMARK = [("River test", MANY, ("The second one, near the market and the mill.", "No."))]

FAULTS = {
    "a rating off its scale": Fault("error", "rows", "rows that cannot be used", _bad_rating),
    "a broken line": Fault("error", "rows", "rows that cannot be used", _broken_line),
    "a prompt on both sides": Fault("error", "split", "prompts on both sides", _two_sides),
    "a prompt nearly on both sides": Fault(
        "warning", "split", "nearly the same as one on the other side", _near_prompt_leaks
    ),
    "a repeated rating": Fault("warning", "repeated rows", "repeat another", _repeat),
    "a repeated pair": Fault("warning", "repeated rows", "repeat another", _repeated_pair),
    "a repeated list": Fault("warning", "repeated rows", "repeat another", _repeated_list),
    "two ratings of one text": Fault("warning", "label noise", "rate the same text", _two_minds),
    "a preference both ways": Fault("warning", "label noise", "contradict one another", _both_ways),
    "a circle of preferences": Fault("warning", "label noise", "contradict one another", _circle),
    "flipped pairs": Fault("note", "label noise", "contradict the others", _flipped, probe=True),
    "control characters": Fault(
        "warning",
        "texts",
        "control characters",
        _in_text("pairs", "rejected", "\x07", "pairs:6 `rejected`"),
    ),
    "a lost letter": Fault(
        "warning",
        "texts",
        "replacement character",
        _in_text("ratings", "messages", "\ufffd", "ratings:6 `messages[1].content`"),
    ),
    "text read in a wrong encoding": Fault(
        "warning",
        "texts",
        "UTF-8 that was read as Latin-1",
        _in_text("pairs", "chosen", " caf\u00c3\u00a9", "pairs:6 `chosen`"),
    ),
    "a template's mark": Fault(
        "warning",
        "texts",
        "marks of a chat template",
        _in_text("pairs", "chosen", "<|eot_id|>", "pairs:6 `chosen`"),
    ),
    "an endless text": Fault(
        "note",
        "texts",
        "100,000 characters or more",
        _in_text("pairs", "chosen", " so" * 40_000, "pairs:6 `chosen`"),
    ),
    "nearly the same response": Fault(
        "note", "near-duplicates", "responses nearly the same", _near_response
    ),
    "nearly the same prompt": Fault(
        "note", "near-duplicates", "prompts nearly the same", _near_prompts
    ),
    "boilerplate": Fault("note", "boilerplate", "given to many prompts", _boilerplate),
    "a constant objective": Fault(
        "error", "objectives", "all ratings of 'clarity' are 7", _constant
    ),
    "a nearly constant objective": Fault(
        "warning", "objectives", "of the ratings of 'clarity' are 7", _nearly_constant
    ),
    "another scale": Fault(
        "warning",
        "objectives",
        "'clarity' lie between 0 and 1 on a scale declared 0 to 10",
        _narrow,
    ),
    "too few ratings": Fault(
        "error", "objectives", "'clarity' has 7 ratings and 0 judgements, fewer than", _few
    ),
    "one objective twice": Fault(
        "note", "objectives", "'honesty' and 'clarity' order responses alike", _alike
    ),
    "a scale turned round": Fault(
        "warning", "objectives", "'clarity' fall where the others rise", _reversed
    ),
    "length rated": Fault("note", "style", "'clarity' follow words within prompts", _long_is_good),
    "length preferred": Fault(
        "note", "style", "the chosen response has more words in", _long_is_chosen
    ),
    "a benchmark's prompt": Fault(
        "warning", "benchmarks", "texts that are in River test too", _contaminated
    ),
}
