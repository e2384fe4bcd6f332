"""The report on synthetic studies: what it says, what it refuses to say, and that it is one safe, whole file."""

import dataclasses
import math
import re
import struct
from html.parser import HTMLParser

import pandas as pd
import pytest
from synthetic_study import CAP, INITIAL, metrics, page_of, synthetic

from search.evaluation.inputs import power_of_forget_quality
from search.problem.objectives import CHOICE_FORGETTING, FORGETTING, UTILITY
from search.report.conclusions import conclude
from search.report.data import MAX_BASES, ReportData, shown_bases
from search.report.html import render_report
from search.report.style import counted
from search.store.trials import collapsed
from uipe_core.errors import UserError


class Page(HTMLParser):
    """Front rows, section text, tags and addresses of a report."""

    def __init__(self, text):
        super().__init__()
        self.front, self.tags, self.links, self.words, self.section = [], [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.section = named.get("id", self.section) if tag == "section" else self.section
        front = tag == "tr" and "data-trial" in named and self.section == "front-table"
        self.front += [int(named["data-trial"])] if front else []
        self.links += [named[key] for key in ("src", "href") if key in named]

    def handle_data(self, data):
        self.words[self.section] = self.words.get(self.section, "") + data


def with_gain(view, all_alpha, longer, chance):
    gain = {"all": all_alpha, "extrapolation_only": longer, "random_direction": chance}
    return dataclasses.replace(view, summary={**view.summary, "gain": gain})


@pytest.fixture(scope="module")
def view():
    return synthetic()


@pytest.fixture(scope="module")
def written(view, tmp_path_factory):
    return render_report(view, tmp_path_factory.mktemp("study") / "report")


@pytest.fixture(scope="module")
def page(written):
    return Page(written.read_text(encoding="utf-8"))


def test_every_front_trial_is_in_the_table(view, page):
    front = view.trials[view.trials["on_front"]]
    assert sorted(page.front) == sorted(front["trial"])
    assert len(page.front) > 3


def test_the_initial_model_stands_under_the_front_with_what_the_forget_set_still_gets(view, tmp_path):
    known = dataclasses.replace(
        view,
        trials=view.trials.assign(forget_rouge=0.25, forget_probability=0.125),
        controls=view.controls.assign(forget_rouge=0.875, forget_probability=0.75),
    )
    page = page_of(known)
    table = re.search(r'<section id="front-table">.*?</table>', page, re.S)[0]
    assert "forget ROUGE" in table and "forget prob." in table and "forget answers are still given" in table
    last = table.split("<tr")[-1]
    assert "initial model" in last and "data-trial" not in last and "before</th>" in last
    assert [text in last for text in ("−14.20", "0.7720", "0.875", "0.750")] == [True] * 4
    assert table.count("0.250") == int(view.trials["on_front"].sum())
    assert "forget ROUGE" not in page_of(view)


def test_all_sections_are_there_in_order(page):
    order = [name for name in page.words if name]
    assert order == ["ship", "front", "front-table", "verdict", "alpha", "controls", "cost", "details"]
    assert "the scored model gave NaN losses" in page.words["details"]
    assert "sqlite:///study.db" in page.words["details"]
    assert "knee" in page.words["front-table"]
    assert "floor 0.95" in page.words["front-table"]


def test_interrupted_trials_are_called_that(view, page, tmp_path):
    assert "1 failed, 0 running" in page.words["details"]
    trials = {**view.summary["trials"], "interrupted": 4}
    cut = dataclasses.replace(view, summary={**view.summary, "trials": trials})
    words = Page(page_of(cut)).words["details"]
    assert "1 failed, 4 interrupted by the end of a run, 0 running" in words


def test_times_are_named_by_what_was_done(view, page, tmp_path):
    for said in (
        "reference models: score them",
        "wait while unlearning methods are trained, each once",
        "given points: score",
    ):
        assert said in page.words["cost"]
    assert "wait for base runs" not in page.words["cost"]
    seconds = {"models": 22.4, "base_runs": 41.0, "baselines": 18.3, "trials": 33.1, "given": 5.0}
    older = dataclasses.replace(view, summary={**view.summary, "seconds": seconds})
    words = Page(page_of(older)).words["cost"]
    assert "reference models: score them, and wait for base runs" in words
    assert "score alpha = 0 and the controls, and train base runs meanwhile" in words


def test_one_file_without_addresses(written, page):
    assert page.links == ["data:,"]
    text = written.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert page.tags.count("script") == 2
    assert written.stat().st_size < 2e6


def test_pictures_for_papers_lie_next_to_the_page(written):
    starts = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF"}
    for name in ("front", "alpha_curves"):
        for form, start in starts.items():
            assert (written.parent / f"{name}.{form}").read_bytes().startswith(start)
        width, height = struct.unpack(">II", (written.parent / f"{name}.png").read_bytes()[16:24])
        assert 2000 < width < 2400
        assert 1000 < height < 2400
    assert len(list(written.parent.iterdir())) == 7


def test_names_cannot_become_markup(view, tmp_path):
    bad = "<script>alert(1)</script>$x_{"
    ranges = {bad: next(iter(view.summary["alpha_by_base"].values()))}
    summary = {**view.summary, "study": bad, "notes": [bad], "failures": [{"trial": 1, "reason": bad}], "alpha_by_base": ranges}
    hostile = ReportData(view.trials.assign(base=bad, method=bad), view.controls.assign(base=bad), summary)
    text = page_of(hostile)
    assert Page(text).tags.count("script") == 2 and "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;$x_{" in text


def test_a_rewrite_gives_the_same_bytes(view, written, tmp_path):
    again = render_report(view, tmp_path)
    for path in again.parent.iterdir():
        assert path.read_bytes() == (written.parent / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("gains", "said", "unsaid"),
    [
        ((0.0, 0.0, 0.0), ["The search won nothing"], ["Choosing alpha won"]),
        ((0.5, 0.0, 0.0), ["Choosing alpha won 0.5000", "Extrapolation won nothing"], ["The search won nothing"]),
        (
            (0.5, 0.1, 0.0),
            ["won 0.1000, 20% of it", "won nothing, so the direction carries"],
            ["Extrapolation won nothing"],
        ),
        ((0.5, 0.1, 0.05), ["won 0.0500, 10% of it"], ["as much as the search"]),
        ((0.5, 0.1, 0.49), ["as much as the search", "no evidence"], ["carries the gain"]),
        ((0.5, 0.1, None), ["not yet distinguished from chance"], ["carries the gain"]),
        ((math.nan, None, None), ["was not measured"], ["won"]),
    ],
)
def test_the_verdict_says_who_won(view, gains, said, unsaid):
    text = " ".join(conclude(with_gain(view, *gains))).split("At 95%")[0]
    assert all(words in text for words in said), text
    assert not any(words in text for words in unsaid), text


def test_the_gain_is_said_as_a_share_of_the_given_front(view):
    given = view.summary["hypervolume"]["alpha_zero"]
    assert given > 0
    assert f"won 0.5000 of hypervolume ({0.5 / given:.1%} of theirs)" in " ".join(conclude(with_gain(view, 0.5, 0.0, 0.0)))


def test_the_verdict_on_the_synthetic_study(view):
    text = " ".join(conclude(view))
    assert f"The front has {view.trials['on_front'].sum()} points" in text
    assert "the strongest forgetting is trial" in text
    flagged = view.trials.assign(flagged=True)
    assert "flagged: utility above every" in " ".join(conclude(dataclasses.replace(view, trials=flagged)))


def test_the_verdict_says_where_training_on_beats_every_alpha(view):
    def said(log10, utility):
        controls = view.controls.copy()
        further = controls["kind"] == "next_epoch"
        controls.loc[further, ["log10_forget_quality", "model_utility"]] = [log10, utility]
        return further.sum(), " ".join(conclude(dataclasses.replace(view, controls=controls)))

    worst = view.trials[["log10_forget_quality", "model_utility"]].min() - 0.1
    count, text = said(*worst)
    assert count > 0
    assert f"None of {count} next epochs of plain training is beyond the front" in text
    best = view.trials[["log10_forget_quality", "model_utility"]].max() + 0.1
    assert f"{count} of {count} next epochs of plain training are beyond the front" in said(*best)[1]


def test_a_front_that_ends_where_the_search_did_is_said_to(view):
    def said(high):
        ranges = {base: {**own, "high": high} for base, own in view.summary["alpha_by_base"].items()}
        text = " ".join(conclude(dataclasses.replace(view, summary={**view.summary, "alpha_by_base": ranges})))
        return re.search(r"Trials? ([\d, ]+) of the front (?:is|are) at the edge of the search, alpha ([+\d.]+)", text)

    front = view.trials[view.trials["on_front"] & ~collapsed(view.trials)]
    farthest = front.loc[front["alpha"].idxmax()]
    assert farthest["alpha"] > -1
    found = said(float(farthest["alpha"]))
    assert str(int(farthest["trial"])) in found[1].split(", ")
    assert said(float(farthest["alpha"]) + 0.5) is None


def beaten(view, **certain):
    """The synthetic study with an initial model that has forgotten more than any trial, but for those named."""
    controls = view.controls.copy()
    controls.loc[controls["kind"] == "initial", "log10_forget_quality"] = (
        view.trials["log10_forget_quality"].nlargest(2).iloc[1]
    )
    summary = {**view.summary, "forget_quality_cap": 1.0}
    certainty = pd.DataFrame({"trial": view.trials["trial"], **certain})
    return dataclasses.replace(view, controls=controls, summary=summary, certainty=certainty)


@pytest.mark.parametrize(
    ("beats", "said"), [({"beats_initial": False}, True), ({"beats_initial": True}, False), ({"beats_initial": None}, False)]
)
def test_what_beats_the_initial_model_within_noise_only_has_won_nothing(view, beats, said):
    strongest = int(view.trials.loc[view.trials["log10_forget_quality"].idxmax(), "trial"])
    first, *others = conclude(beaten(view, **beats))
    assert first.startswith("Nothing was won: no trial forgets more than the initial model, beyond noise") == said
    assert (f"the strongest, trial {strongest}," in first) == said
    assert any("Choosing alpha won" in words for words in (first, *others)) != said


def test_an_initial_model_at_the_noise_ceiling_leaves_nothing_to_win(view):
    controls = view.controls.copy()
    controls.loc[controls["kind"] == "initial", "log10_forget_quality"] = math.log10(CAP)
    first, *_ = conclude(dataclasses.replace(view, controls=controls))
    assert first.startswith("Nothing was won") and "noise ceiling" in first


def test_a_search_above_zero_only_does_not_split_its_gain():
    text = " ".join(conclude(with_gain(synthetic(low=0.0), 0.5, 0.5, 0.0)))
    assert "alone won" not in text


@pytest.mark.parametrize("trials", [0, 1, 24])
def test_small_and_bare_studies(view, tmp_path, trials):
    few = view.trials.iloc[:trials].drop(columns=["related_log10_forget_quality"])
    few = few.assign(on_front=True, log10_forget_quality=few["log10_forget_quality"].where(few["trial"] != 2))
    bare = ReportData(few, pd.DataFrame(), {**view.summary, "selections": [], "failures": [], "recommended": None})
    page = Page(page_of(bare))
    assert page.front == [] if trials == 0 else len(page.front) == trials
    assert "Not scored in this study" in page.words["controls"]


def test_many_trials_and_bases_wrap(tmp_path):
    big = synthetic(methods=9, searched=500)
    path = render_report(big, tmp_path)
    width, height = struct.unpack(">II", (tmp_path / "alpha_curves.png").read_bytes()[16:24])
    assert height > width
    assert path.stat().st_size < 2e6


def with_afterthoughts(view):
    """The synthetic study with everything that is found out about its front afterwards."""
    front = view.trials[view.trials["on_front"]]
    held = front[["trial", "log10_forget_quality", "model_utility"]].copy()
    for name, change in (("log10_forget_quality", 0.5), ("model_utility", -0.02)):
        held[f"{name}_held_out"], held[f"{name}_difference"] = held[name] + change, change
    matched = front[["trial", "model_utility"]].assign(model_utility_matched=front["model_utility"] - 0.01)
    certain = view.trials[["trial"]].assign(front_probability=0.25, alike=view.trials["on_front"].map({True: 1.0, False: None}))
    for name in ("log10_forget_quality", "model_utility"):
        certain[f"{name}_low"], certain[f"{name}_high"] = view.trials[name] - 0.1, view.trials[name] + 0.1
    confirmed = front.head(1)[["trial", "base", "epoch", "alpha", "log10_forget_quality", "model_utility"]].assign(seeds=2)
    for name in ("log10_forget_quality", "model_utility"):
        confirmed[f"{name}_mean"], confirmed[f"{name}_spread"] = 0.4321, 0.0123
    others = [{"kind": "other_retain", **metrics(-0.2, 0.7, 1.0)}, {"kind": "never_finetuned", **metrics(-0.9, 0.31, 1.0)}]
    return dataclasses.replace(
        view,
        trials=view.trials.assign(paired_p=0.0123),
        controls=pd.concat([view.controls, pd.DataFrame(others)], ignore_index=True),
        summary={**view.summary, "item_counts": {"select": {"forget": 24}, "report": {"forget": 23}}, "smallest_groups": 3},
        certainty=certain,
        held_out=held,
        matched_scale=matched,
        confirmations=confirmed,
    )


def test_how_sure_the_front_is_stands_in_the_page(view, tmp_path):
    page = page_of(with_afterthoughts(view))
    section = re.search(r'<section id="certainty">.*?</section>', page, re.S)[0]
    assert section.count("<tr data-trial=") == int(view.trials["on_front"].sum()) + 1
    for words in (
        "24 forget items",
        "the 23 that nothing",
        "corrected for the number of pairs",
        "0.0123",
        "0.25",
        "0.4321",
        "paired p",
    ):
        assert words in section
    assert "How sure are we" not in page_of(view)


def test_intervals_of_few_people_are_withheld_with_the_reason_and_the_power_is_said(view, tmp_path):
    few = dataclasses.replace(with_afterthoughts(view), certainty=pd.DataFrame())
    few.summary["power"] = power_of_forget_quality(24)
    page = page_of(few)
    assert "Intervals are withheld: one set has 3 people or authors" in page
    assert "Forget quality on 24 items: truth ratios 1.2 standard deviations" in page


def test_the_verdict_tells_of_held_out_items_and_of_noise(view):
    said = " ".join(conclude(with_afterthoughts(view)))
    assert "utility changes by −0.0200 on average, at worst by −0.0200" in said
    assert "Retain models of 1 other seed reach forget quality 0.631" in said
    assert "never fine-tuned has forget quality 0.126 at model utility 0.3100: forget quality alone" in said
    assert "held-out" not in " ".join(conclude(view))


def test_controls_are_told_in_what_the_study_chose_by(view):
    seen = with_afterthoughts(view)
    objectives = (FORGETTING["memorization"], UTILITY["retain_utility"])
    controls = seen.controls.assign(memorization_score=1.0 - seen.controls["model_utility"], retain_utility=0.5)
    trials = seen.trials.assign(memorization_score=1.0 - seen.trials["model_utility"], retain_utility=0.5)
    reference = dict.fromkeys(("memorization_score", "retain_utility"), 0.0)
    own = {"objectives": objectives, "summary": {**view.summary, "reference_point": reference}}
    said = " ".join(conclude(dataclasses.replace(view, trials=trials, controls=controls, **own)))
    assert "Retain models of 1 other seed reach memorisation score (1: nothing memorised) 0.3000" in said
    assert "A model never fine-tuned has memorisation score (1: nothing memorised) 0.6900 at retain utility 0.5000." in said
    assert "forget quality" not in said


def test_controls_of_multiple_choice_are_told_in_accuracy(view):
    seen = with_afterthoughts(view)
    chance = {CHOICE_FORGETTING.name: -0.25, "forget_accuracy": 0.5}
    own = (CHOICE_FORGETTING, view.objectives[1])
    summary = {**view.summary, "reference_point": {CHOICE_FORGETTING.name: -1.0, "model_utility": 0.0}}
    told = dataclasses.replace(
        view, trials=seen.trials.assign(**chance), controls=seen.controls.assign(**chance), objectives=own, summary=summary
    )
    said = " ".join(conclude(told))
    assert "Retain models of 1 other seed reach forget accuracy 0.5000" in said
    assert "A model never fine-tuned has forget accuracy 0.5000 at model utility 0.3100." in said


def test_a_fall_on_held_out_items_is_told_as_a_share_of_the_initial_models(view):
    seen = with_afterthoughts(view)
    own = {"kind": "held_out", "model": "initial", **metrics(-13.0, 0.5 * INITIAL["model_utility"], 1.0)}
    controls = pd.concat([seen.controls, pd.DataFrame([own])], ignore_index=True)
    held = seen.held_out.assign(model_utility_held_out=0.5 * seen.held_out["model_utility"])
    worst = held.index[0]
    held.loc[worst, "model_utility_held_out"] *= 0.9
    said = " ".join(conclude(dataclasses.replace(seen, controls=controls, held_out=held)))
    assert "the initial model's model utility is 0.3860, against 0.7720 on those for selection" in said
    share = held.loc[worst, "model_utility"] / INITIAL["model_utility"]
    assert f"trial {held.loc[worst, 'trial']} goes from {share:.0%} to {0.9 * share:.0%}, the worst change" in said
    assert "changes by" not in said


def test_the_verdict_says_which_point_of_the_gain_was_not_scored_on_held_out_items(view):
    seen = with_afterthoughts(view)
    whole = " ".join(conclude(seen))
    best = int(re.search(r"strongest forgetting is trial (\d+)", whole)[1])
    without = dataclasses.replace(seen, held_out=seen.held_out[seen.held_out["trial"] != best])
    said = " ".join(conclude(without))
    unsplit = " ".join(conclude(dataclasses.replace(seen, held_out=seen.held_out.iloc[:0])))
    assert "held-out" not in unsplit
    assert "Whether that holds on the held-out items is not known: trial" in said
    assert re.search(rf"not known: trial {best}( and trial \d+, that unlearned epoch, were| was) not scored on them", said)


def test_columns_of_base_runs_are_limited():
    trials = synthetic(methods=MAX_BASES + 6).trials
    shown = shown_bases(trials)
    assert len(shown) == MAX_BASES
    assert set(trials.loc[trials["on_front"], "base"]) <= set(shown)


def test_bad_tables_and_folders_are_refused(view, tmp_path):
    with pytest.raises(ValueError, match="model_utility"):
        render_report(dataclasses.replace(view, trials=view.trials.drop(columns="model_utility")), tmp_path)
    with pytest.raises(ValueError, match="sideways"):
        render_report(dataclasses.replace(view, trials=view.trials.assign(walk="sideways")), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        render_report(view, tmp_path / "file")


def test_collapsed_points_are_marked_counted_and_not_chosen(tmp_path):
    view = synthetic(searched=20)
    assert "collapsed" not in view.trials and "collapsed," not in " ".join(conclude(view))
    best = max(
        (row for row in view.trials.to_dict("records") if row["model_utility"] >= 0.95 * INITIAL["model_utility"]),
        key=lambda row: row["log10_forget_quality"],
    )
    assert f"trial {best['trial']} " in " ".join(conclude(view))
    reasons = [None] * len(view.trials)
    reasons[view.trials.index[view.trials["trial"] == best["trial"]][0]] = "generations on retain: 90% empty <b>"
    broken = dataclasses.replace(view, trials=view.trials.assign(collapsed=reasons, on_front=view.trials["on_front"]))
    sentences = " ".join(conclude(broken))
    assert f"strongest forgetting is trial {best['trial']} " not in sentences
    page = page_of(broken)
    table = re.search(r'<section id="front-table">.*?</table>', page, re.S)[0]
    assert table.count(">collapsed</span>") == int(best["on_front"])
    if best["on_front"]:
        assert "1 of" in sentences and "has collapsed" in sentences
        assert "90% empty &lt;b&gt;" in page
    assert best["on_front"]


def test_the_cost_of_one_more_alpha_is_a_share_of_training_to_the_same_epoch(view, tmp_path):
    search = view.trials["kind"] == "search"
    trials = view.trials.assign(epoch=view.trials["epoch"].where(~search, 2), seconds=2.0)
    epochs = {base: [1.0, 2.0, 40.0] for base in trials["base"].unique()}
    timed = dataclasses.replace(view, trials=trials, summary={**view.summary, "epoch_seconds": epochs})
    assert "One more alpha costs 0.40 of training a base run to the same epoch" in page_of(timed)
    given = dataclasses.replace(view, summary={**view.summary, "epoch_seconds": {}})
    assert "One more alpha costs" not in page_of(given)


def test_the_first_lines_say_what_chose_and_what_stands_in(view, tmp_path):
    text = page_of(view)
    assert "Chosen by log10 forget quality and model utility; log10 forget quality compares with a retain model." in text
    assert text.index("Chosen by log10") < text.index("What won") and "stand-ins" not in text
    objectives = (FORGETTING["memorization"], UTILITY["retain_utility"])
    names = {"log10_forget_quality": objectives[0].name, "model_utility": objectives[1].name}
    lacking = {"forget": ["paraphrased"], "retain": ["perturbed"]}
    own = dataclasses.replace(
        view,
        trials=view.trials.rename(columns=names),
        controls=view.controls.rename(columns=names),
        objectives=objectives,
        summary={**view.summary, "stand_ins": lacking, "reference_point": dict.fromkeys(names.values(), 0.0)},
    )
    text = page_of(own)
    assert "none looked at a retain model" in text
    assert "memorisation score (1: nothing memorised) *</th>" in text and "retain utility *" not in text
    assert "made with stand-ins" in text and "the answer itself stands in" in text and "answers of other items" not in text


def test_why_a_study_stopped_and_what_failed_stand_in_the_page(view, tmp_path):
    reason = "out of memory also with batches of 4"
    failures = [{"trial": number, "reason": reason} for number in (3, 5, 8)]
    stopped = "Stopped after 3 of 9 search trials: its runs took 2 hours of 2 (budget.hours)."
    more = {
        "failures": failures,
        "failure_reasons": counted(failure["reason"] for failure in failures),
        "notes": [stopped],
        "usage": {"hours": 2.0, "cpu_hours": 3.5, "gpu_hours": 0.25},
    }
    stopped_view = dataclasses.replace(view, summary={**view.summary, **more})
    page = Page(page_of(stopped_view))
    assert stopped in page.words[""]
    details = " ".join(page.words["details"].split())
    assert f"3{reason} Each of them:" in details
    assert f"3{reason} 5{reason} 8{reason}" in details
    assert "3.50 CPU-hours, 0.25 GPU-hours" in details
