"""The first screen of the report: which model to ship, and what speaks against it. Also what the page's colours must keep."""

import dataclasses
import json
import math
import re
import shlex

import pandas as pd
import pytest
from synthetic_study import INITIAL, page_of, synthetic

from search.report.charts import LONGEST_ANSWERS, MOST_TRIALS, chart_data
from search.report.data import Answers, recommended, report_data
from search.report.html import checked
from search.report.recommendation import AGAINST, HELD, UNTESTED, attacks, doubts, examples, export_command, recommendation
from search.report.style import DARK, LIGHT, PALETTE, probability


@pytest.fixture(scope="module")
def view():
    return checked(synthetic())


def changed(view, **summary):
    return dataclasses.replace(view, summary={**view.summary, **summary})


def shown(view):
    return {sentence: kind for kind, sentence in recommendation(view)["findings"]}


def finding(view, words):
    (kind,) = [kind for sentence, kind in shown(view).items() if words in sentence]
    return kind


def test_the_first_screen_names_the_model_its_numbers_before_and_after_and_its_export(view):
    trial = view.summary["recommended"]["trial"]
    row = view.trials.set_index("trial").loc[trial]
    name = "log10_forget_quality"
    sure = pd.DataFrame({"trial": [trial], f"{name}_low": [-3.0], f"{name}_high": [-1.0], "beats_initial": [True]})
    sure = sure.assign(front_probability=0.5, alike=1)
    page = page_of(dataclasses.replace(view, certainty=sure))
    first = re.search(r'<section class="ship".*?</section>', page, re.S)[0]
    assert f"Recommended model: {row['base']}, epoch {row['epoch']}" in first
    assert "chosen by the rule utility-floor 0.95" in first and "Chosen by log10 forget quality" in first
    assert f"<b>{probability(row['forget_quality'])}</b>" in first and f"<b>{row['model_utility']:.4f}</b>" in first
    assert f"before {probability(10 ** INITIAL[name])}; 95% interval 0.001 to 0.100" in first
    assert f"before 0.7720 ({row['model_utility'] / 0.772:.0%} kept)" in first
    assert page.index('id="ship"') < page.index('id="front"') < page.index('id="verdict"')
    assert (
        f"uipe export &#39;runs/quick start&#39; --trial {trial} --to &#39;runs/quick start/export/{trial}&#39; --as model"
        in first
    )


def test_the_command_is_one_line_of_a_shell():
    words = shlex.split(export_command("a b/$(x);'q'", 7))
    assert words == ["uipe", "export", "a b/$(x);'q'", "--trial", "7", "--to", "a b/$(x);'q'/export/7", "--as", "model"]


def test_where_nothing_was_won_no_model_is_recommended(view):
    beaten = view.trials.assign(log10_forget_quality=-20.0)
    first = recommendation(dataclasses.replace(view, trials=beaten))
    assert first["trial"] is None and first["verdict"].startswith("Keep the initial model. Nothing was won")
    page = page_of(dataclasses.replace(view, trials=beaten))
    assert "Recommended model: none of these" in page and "What speaks against it" not in page
    nobody = recommendation(changed(view, recommended=None))
    assert nobody["trial"] is None and "No rule finds a model" in nobody["verdict"]


def test_what_the_study_says_against_a_trial_comes_first(view):
    trial = view.summary["recommended"]["trial"]
    names = ["log10_forget_quality", "model_utility"]
    held = view.trials[["trial", *names]].assign(model_utility_held_out=0.5, log10_forget_quality_held_out=-1.0)
    controls = pd.concat(
        [view.controls, pd.DataFrame([{"kind": "held_out", "model": "initial", "model_utility": 0.8, names[0]: -14.0}])]
    )
    loud = dataclasses.replace(
        changed(view, gain={"all": 0.5, "random_direction": 0.49}, forget_quality_cap=1e-30),
        trials=view.trials.assign(flagged=True),
        controls=controls,
        certainty=pd.DataFrame({"trial": [trial], "beats_initial": [False]}),
        held_out=held,
        matched_scale=view.trials[["trial", "model_utility"]].assign(model_utility_matched=0.4),
    )
    # Above such a ceiling nothing is known to be won, and the verdict would say that alone.
    row = loud.trials[loud.trials["trial"] == trial].iloc[0]
    found = doubts(loud, row)
    assert {kind for kind, _ in found} == {AGAINST}
    said = " ".join(sentence for _, sentence in found)
    for words in (
        "Flagged",
        "range of noise",
        "chance explains",
        "Within noise",
        "keeps 62%",
        "as sharp as the initial model's",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("key", "values", "kind"),
    [
        ("recovered", (0.9, None, None), AGAINST),
        ("recovered", (0.2, None, None), HELD),
        ("min_k_auc", (0.1, 0.99, 0.5), AGAINST),
        ("min_k_auc", (0.55, 0.99, 0.5), HELD),
        ("min_k_auc", (0.75, 0.99, None), AGAINST),
        ("prompts_contained", (0.4, 0.9, 0.1), AGAINST),
        ("prompts_contained", (0.0, 0.9, 0.3), HELD),
        ("sampling_contained", (0.2, 0.9, 0.15), HELD),
        ("faulty_forget", (0.5, 0.0, None), AGAINST),
        ("faulty_kept", (0.05, 0.0, None), HELD),
    ],
)
def test_audits_speak_for_or_against(view, key, values, kind):
    trial = str(view.summary["recommended"]["trial"])
    of_models = dict(zip((trial, "initial", "retain"), values, strict=True))
    audit = {"title": "an attack", "numbers": [{"key": key, "values": of_models}]}
    (found,) = attacks(dataclasses.replace(view, audits={"audits": [audit]}), int(trial))
    assert found[0] == kind and (f"{values[0]:.2f}" in found[1] or f"{values[0]:.0%}" in found[1])


def test_what_was_not_tested_is_said_with_the_command_that_tests_it(view):
    trial = view.summary["recommended"]["trial"]
    untested = [{"title": "relearned", "reason": "not asked for"}, {"title": "membership", "reason": "needs holdout items"}]
    open_view = changed(view, untested=untested)
    assert finding(open_view, f"Attacks: relearned. Run: uipe audit 'runs/quick start' --trial {trial}") == UNTESTED
    assert finding(open_view, "membership: needs holdout items.") == UNTESTED
    assert finding(open_view, "Other training seeds") == UNTESTED
    assert finding(open_view, "beyond noise: too few") == UNTESTED
    assert finding(open_view, "Items that nothing was chosen by") == UNTESTED
    kinds = list(shown(open_view).values())
    assert kinds == sorted(kinds, key=[AGAINST, UNTESTED, HELD].index)


def test_examples_are_the_first_of_each_kind_and_are_escaped(view):
    trial = view.summary["recommended"]["trial"]
    items = [(name, f"{name}?<b>", "gold", "old <i>") for name in ("retain", "world_facts", "forget", "forget", "related")]
    texts = ["kept", "known", "", "second", "hidden"]
    with_texts = dataclasses.replace(view, answers=Answers(items, {trial: texts}))
    found = examples(with_texts, trial)
    assert [(each["role"], each["after"]) for each in found] == [
        ("to forget", ""),
        ("to keep", "kept"),
        ("general knowledge", "known"),
    ]
    assert examples(with_texts, -5) == [] and examples(view, trial) == []
    page = page_of(with_texts)
    assert "forget?&lt;b&gt;" in page and "(nothing)" in page and "forget?<b>" not in page


def test_charts_have_every_trial_and_no_more_answers_than_fit(view):
    known = view.trials["trial"].tolist()
    items = [("forget", "q", "a", "b")]
    half = Answers(items, {number: ["x" * (LONGEST_ANSWERS // 2)] for number in known})
    data = chart_data(dataclasses.replace(view, answers=half), known[0])
    assert [each[0] for each in data["trials"]] == known and data["recommended"] == known[0]
    assert len(data["answers"]["trials"]) == 1  # with its quotation marks a second one is too long
    text = json.dumps(data, allow_nan=False)
    assert len(json.dumps(chart_data(view, None))) < 200 * len(known) + 8000 and "NaN" not in text


def test_a_page_of_many_trials_stays_below_two_megabytes(view):
    many = pd.concat([view.trials] * 80, ignore_index=True).assign(on_front=False)
    many = many.assign(trial=range(len(many)), on_front=[number >= len(many) - 9 for number in range(len(many))])
    texts = {number: ["ответ " * 60] * 9 for number in many["trial"]}
    long = Answers([("forget", "вопрос", "ответ", "ответ")] * 9, texts)
    page = page_of(dataclasses.replace(view, trials=many, answers=long))
    assert len(many) > MOST_TRIALS and len(page.encode()) < 2e6
    assert f"The charts show {MOST_TRIALS} of {len(many)} trials" in page
    drawn = {each[0] for each in chart_data(dataclasses.replace(view, trials=many), None)["trials"]}
    assert len(drawn) == MOST_TRIALS and set(many.loc[many["on_front"], "trial"]) <= drawn


def test_a_number_that_is_none_is_null_in_the_charts(view):
    broken = view.trials.assign(log10_forget_quality=math.nan)
    assert {each[7][0] for each in chart_data(dataclasses.replace(view, trials=broken), None)["trials"]} == {None}


def test_the_model_of_a_real_study_is_what_its_rule_chooses(result):
    found, view = recommended(result), report_data(result)
    if found is None:
        assert recommendation(view)["trial"] is None
    else:
        assert found["trial"] == int(result.select(found["rule"].split()[0])["trial"])
    assert view.summary["recommended"] == found


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_texts_and_marks_have_the_contrast_that_wcag_aa_asks_for(colours):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    grounds = [colours[name] for name in ("page", "soft", "warn")]
    for name in ("ink", "muted", "accent", "against", "held"):
        assert min(contrast(colours[name], ground) for ground in grounds) >= 4.5, name
    marks = ["faint", *(name for name in colours if name.startswith(("method-", "scale-")))]
    assert {
        name: contrast(colours[name], colours["page"]) for name in marks if contrast(colours[name], colours["page"]) < 3
    } == {}
    assert set(LIGHT) == set(DARK) and len(set(PALETTE)) == 8
