from __future__ import annotations

from typing import Any

import pytest

from geopd.report.abstract import abstract, claim_sentence, opening

HELD = {"verdict": "held", "seeds": 3, "estimate": 0.5, "interval": [0.25, 0.75]}
ONE = {"verdict": "unresolved", "seeds": 1, "estimate": 0.5, "interval": None}


def comparison(**changes: Any) -> dict[str, Any]:
    measured = {"sft-s0": 0.01, "sft-s1": 0.03, "opd-s0": 0.1, "opd-s1": 0.2}
    return {
        "id": "paper",
        "quantity": "update sparsity (eta=0.001;view=bf16)",
        "runs": {"opd": ["opd-s0", "opd-s1"], "sft": ["sft-s0", "sft-s1"]},
        "measured": measured,
        "null": "gaussian",
        "deciding": "SFT < OPD",
        "statements": [{"text": "SFT < OPD", "margin": None}],
        "shows_here": "yes",
        "null_shows": "yes",
        "verdict": "held",
    } | changes


def claim(*others: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {
        "number": "C1",
        "question": "RQ1",
        "id": "sparsity_order",
        "statement": "OPD leaves more weights visibly unchanged than SFT.",
        "summary": "paper",
        "shows_here": "yes",
        "null_shows": "yes",
        "beyond_null": "no",
        "explained": "no",
        "seeds_needed": None,
        "comparisons": [comparison(), *others],
    }
    return base | HELD | changes


def said(*others: dict[str, Any], **changes: Any) -> str:
    return claim_sentence(claim(*others, **changes))["text"]


def test_a_sentence_has_the_means_over_seeds_the_closest_estimate_and_its_interval() -> None:
    text = said()
    assert text.startswith("SFT 2.0 %, OPD 15.0 %; SFT < OPD: 0.5 [0.25, 0.75]; held")
    assert claim_sentence(claim())["claim"] == "OPD leaves more weights visibly unchanged than SFT"


@pytest.mark.parametrize(
    ("changes", "ending"),
    [
        ({"explained": "yes"}, "held, explained by update size."),
        ({"beyond_null": "yes"}, "held, beyond update size."),
        ({"beyond_null": "no"}, "held, but update size gives even more of it."),
        ({"beyond_null": "unresolved"}, "held; whether beyond update size is unresolved."),
        ({"beyond_null": "no null"}, "held (no null)."),
        ({"verdict": "did not hold"}, "; did not hold."),
        ({"verdict": "unresolved"}, "; unresolved."),
        ({"verdict": "unresolved", "seeds_needed": 7}, "; unresolved, about 7 seeds would settle it either way."),
        (ONE, "; unresolved; one seed shows it, as update size alone would."),
        (ONE | {"null_shows": "no"}, "; one seed shows it, update size would not."),
        (ONE | {"shows_here": "partly", "null_shows": "partly"}, "shows it in part, update size alone would in part."),
        (ONE | {"shows_here": "no"}, "; one seed does not show it."),
        (ONE | {"null_shows": "no null"}, "; one seed shows it."),
        (ONE | {"verdict": "did not hold"}, "; did not hold by one seed and the baselines' spread."),
        (
            ONE | {"verdict": "held", "beyond_null": "no null"},
            "; held by one seed and the baselines' spread (no null).",
        ),
    ],
)
def test_each_verdict_has_its_words(changes: dict[str, Any], ending: str) -> None:
    assert said(**changes).endswith(ending)


def test_a_margin_is_named_beside_its_estimate_and_its_interval_is_at_90_percent() -> None:
    bounded = comparison(deciding="within 15%", statements=[{"text": "within 15%", "margin": 0.14}])
    assert "within 15%: 0.5 [0.25, 0.75; 90%], margin 0.14;" in said(comparisons=[bounded])


def test_paths_are_told_from_first_to_last_and_what_is_more_than_a_number_is_left_to_the_tables() -> None:
    path = comparison(measured={"sft-s0": {"first": 2.0, "last": 4.0}, "sft-s1": {"first": 4.0, "last": 8.0}})
    assert said(comparisons=[path]).startswith("SFT 3 → 6; SFT < OPD")
    many = comparison(measured={"sft-s0": {"stable rank": 2.0, "norm": 1.0}})
    assert said(comparisons=[many]).startswith("SFT < OPD: 0.5")


def test_stricter_comparisons_are_named_where_they_come_out_differently() -> None:
    others = [
        comparison(id="same_origin", verdict="did not hold"),
        comparison(id="same_origin@steps"),
        comparison(id="same_origin@accuracy", verdict="did not hold"),
        comparison(id="same_origin@norm", verdict="unresolved"),
        comparison(id="paper@norm", verdict="did not hold"),
    ]
    assert said(*others).endswith("; did not hold from one origin, at equal accuracy; unresolved at equal update norm.")
    one = comparison(id="same_origin@norm", verdict="unresolved", shows_here="no")
    assert said(one, **ONE).endswith("; not shown at equal update norm.")
    assert said(comparison(id="same_origin", shows_here="not measured")).endswith("gives even more of it.")


def test_the_opening_counts_verdicts_and_what_the_null_explains() -> None:
    claims = [
        claim(explained="yes"),
        claim(beyond_null="yes"),
        claim(verdict="did not hold"),
        claim(**ONE),
        claim(verdict="not measured", seeds=0),
    ]
    assert opening(claims) == (
        "Of 5 claims 2 held (1 explained by the null, 1 beyond it), 1 did not hold, 1 stays unresolved, "
        "1 was not measured. C1 has one seed and no spread to set it beside: no verdict, only what it shows."
    )
    assert opening([claim(verdict="not measured")] * 2) == "None of its 2 claims could be measured in this folder."
    assert "one seed" not in opening([claim(verdict="unresolved")])


def test_the_opening_says_beside_what_the_claims_of_one_seed_are_set() -> None:
    beside = comparison(statements=[{"text": "SFT < OPD", "margin": None, "yardstick": [0.1, 2]}])
    one = ONE | {"comparisons": [beside]}
    decided = claim(**one | {"verdict": "did not hold", "number": "C12"})
    text = opening([claim(), decided, claim(**one, number="C13"), claim(**ONE, number="C14")])
    assert text.endswith(
        "1 did not hold, 2 stay unresolved. C12 and C13 have one seed each, set beside the spread that seeds give the "
        "baselines. C14 has one seed and no spread to set it beside: no verdict, only what it shows."
    )
    assert "no verdict" not in opening([decided])


def test_one_paragraph_a_question_without_further_views_and_without_what_was_not_measured() -> None:
    claims = [
        claim(),
        claim(number="C1b"),
        claim(number="C10", question="RQ2", verdict="not measured"),
    ]
    found = abstract(claims)
    assert [part["question"] for part in found] == ["RQ1", "RQ2"]
    assert [s["number"] for s in found[0]["sentences"]] == ["C1"]
    assert found[1]["sentences"] == []


def test_claims_of_earlier_versions_have_no_abstract() -> None:
    old = claim()
    del old["question"], old["number"]
    assert abstract([old]) == []
