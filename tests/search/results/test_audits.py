"""`uipe audit`: attacks on trials of a really run study, held against computing them by hand; what cannot be done is said."""

import json
from dataclasses import replace

import numpy as np
import pytest

import search
from search.evaluation.controls import CONTROLS
from search.execution.study_run import _done_jobs
from search.problem.trial import AUDITS, UNTESTED, TrialSpec
from search.report.conclusions import conclusions
from search.report.display import print_front
from search.results.audits import after_attacks, audit_table
from search.results.study_result import StudyResult
from search.spec.runtime import Audit, Relearning
from search.spec.sections import Adapter
from search.store.study_store import StudyStore
from uipe_core.errors import UserError

KINDS = [kind for kinds in AUDITS.values() for kind in kinds]
TESTS = ("quantisation", "membership", "fluency")


@pytest.fixture(scope="module")
def audited(finished, place, tmp_path_factory):
    """The finished study, one of its trials audited."""
    import shutil

    out = tmp_path_factory.mktemp("audited") / "copied"
    shutil.copytree(finished.out, out, ignore=shutil.ignore_patterns("ray"))
    best = int(StudyResult.open(out).healthy_front["trial"].iloc[0])
    return search.audit_study(out, [best], tests=TESTS, quiet=True), best


def test_every_kind_of_a_test_is_a_control_that_says_what_it_shows_and_what_not():
    kinds = [kind for kinds in AUDITS.values() for kind in kinds]
    assert kinds == [kind for kind, control in CONTROLS.items() if control.audit is not None]
    for kind in kinds:
        audit = CONTROLS[kind].audit
        assert audit.shows.endswith("?") and audit.cannot_show.endswith(".") and audit.scorings > 0
        assert (audit.changed is None) != (audit.measured is None)
        assert bool(audit.numbers) == (audit.measured is not None)


def test_rounded_weights_are_scored_as_by_hand(audited, preparation):
    """NF4 of the same trial: exported, rounded and scored here."""
    from uipe_core.audits.quantisation import round_weights
    from uipe_core.corpora.split import take_items
    from uipe_core.models.loading import load_model
    from uipe_core.scoring.scorer import Scorer

    result, best = audited
    folder = result.export(result.trial(best), result.out / "exported", "model", verify="none")
    written = (folder / "README.md").read_text()
    assert "| weights in 4 bits (NF4) | share of forgetting undone | - |" in written
    assert "| relearned: a few items | not asked for | not tested | not tested | not tested |" in written
    loaded = load_model(str(folder), device="cpu")
    round_weights(loaded.model, "nf4")
    corpus = take_items(preparation.corpus, preparation.split.select)
    report = Scorer(corpus, loaded.prompts, preparation.scoring).score(loaded)
    rows = result.controls[(result.controls["kind"] == "nf4") & (result.controls["of_trial"] == best)]
    items = result.store.items(int(rows["trial"].iloc[0]), control=True)
    np.testing.assert_allclose(items["forget/answer_loss"], report.sets["forget"].answer_loss, atol=1e-5)
    trial = result.store.items(best)
    assert not np.allclose(items["forget/answer_loss"], trial["forget/answer_loss"], atol=1e-5)


def test_the_table_has_every_audit_and_names_what_was_not_tested(audited):
    result, best = audited
    table = audit_table(result)
    assert list(dict.fromkeys(table["kind"])) == [kind for kinds in AUDITS.values() for kind in kinds]
    by_kind = {each["kind"]: each for each in result.audits["audits"]}
    assert by_kind["nf4"]["state"] == "done" and by_kind["relearn_few"]["state"] == "not tested"
    assert by_kind["membership"]["state"] == "done" and by_kind["membership"]["reasons"] == {}
    forgetting = result.objectives[0].name
    values = next(number["values"] for number in by_kind["nf4"]["numbers"] if number["key"] == forgetting)
    assert set(values) == {"initial", "retain", str(best)} and all(value is not None for value in values.values())
    recovered = next(number["values"] for number in by_kind["nf4"]["numbers"] if number["key"] == "recovered")
    before, start = result.trial(best)[forgetting], result.control("initial")[forgetting]
    assert recovered[str(best)] == pytest.approx((before - values[str(best)]) / (before - start))
    assert recovered["initial"] is None
    shown = {row["title"]: row["texts"] for row in by_kind["nf4"]["rows"]}
    assert shown["share of forgetting undone"]["initial"] == "-"
    assert shown["share of forgetting undone"][str(best)] == f"{recovered[str(best)]:.2f}"
    assert by_kind["relearn_few"]["rows"] == [
        {"title": "not asked for", "texts": dict.fromkeys(("initial", "retain", str(best)), "not tested")}
    ]
    assert [column["title"] for column in result.audits["columns"]] == ["initial model", "retain model", f"trial {best}"]


def test_the_initial_models_texts_are_within_its_own_limits(audited):
    fluency = next(each for each in audited[0].audits["audits"] if each["kind"] == "fluency")
    faulty = next(number["values"] for number in fluency["numbers"] if number["key"] == "faulty_kept")
    assert faulty["initial"] <= 0.1


def test_what_is_known_is_not_done_again_and_the_rest_is(audited, monkeypatch):
    result, best = audited
    before = len(result.controls)

    def refuse(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr("search.execution.study_run.connected", refuse)
    again = search.audit_study(result.out, [best], tests=TESTS, quiet=True)
    assert len(again.controls) == before
    with pytest.raises(AssertionError, match="Ray was started"):
        search.audit_study(result.out, [best], tests=("prompts",), quiet=True)


def audits_of(out):
    """(kind, model) of every complete audit, and whether anything is left running."""
    store = StudyStore.open(out)
    trials = list(store.trials(names=("kind", "model", "of_trial"), controls=True))
    store.close()
    ended = ("COMPLETE", "PRUNED")
    done = [trial for trial in trials if trial.state.name in ended and trial.user_attrs.get("kind") in KINDS]
    found = [(trial.user_attrs["kind"], trial.user_attrs.get("of_trial", trial.user_attrs.get("model"))) for trial in done]
    return found, [trial.number for trial in trials if trial.state.name == "RUNNING"]


@pytest.mark.slow
def test_a_driver_killed_in_the_middle_loses_nothing_and_the_same_command_goes_on(copied, launch):
    wanted = {"initial", "retain", *map(int, StudyResult.open(copied).finalists(2)["trial"])}
    command = ("audit", copied, "--top", "2", "--tests", "quantisation,prompts,sampling,fluency")
    killed = launch(*command)
    killed.until(lambda: len(audits_of(copied)[0]) >= 3)
    killed.process.kill()
    killed.wait()
    before, _ = audits_of(copied)
    driver = launch(*command)
    assert driver.wait() == 0, driver.stderr
    after, running = audits_of(copied)
    assert set(before) <= set(after) and not running
    kinds = [kind for test in ("quantisation", "prompts", "sampling", "fluency") for kind in AUDITS[test]]
    assert sorted(map(str, after)) == sorted(str((kind, name)) for kind in kinds for name in wanted)


def test_a_relearning_that_diverges_is_a_word_and_the_other_audits_go_on(copied, call):
    relearning = Relearning(epochs=20, learning_rate=1000.0, few=2, adapter=Adapter(rank=2))
    section = Audit(top=1, tests=("relearning", "fluency", "prompts"), relearning=relearning)
    spec = StudyResult.open(copied).spec.model_copy(update={"audit": section})
    result = search.run_study(spec, copied, quiet=True)
    by_kind = {each["kind"]: each for each in result.audits["audits"]}
    audited = [name for name in result.audits["models"] if isinstance(name, int)]
    assert len(audited) == 1
    texts = by_kind["relearn_forget"]["rows"][0]["texts"]
    assert texts == dict.fromkeys(("initial", "retain", str(audited[0])), "diverged")
    assert all("diverged" in reason for reason in by_kind["relearn_forget"]["reasons"].values())
    assert by_kind["relearn_forget"]["settings"]["adapter"]["rank"] == 2 and "few" not in by_kind["relearn_forget"]["settings"]
    assert by_kind["fluency"]["state"] == "done" and by_kind["prompts"]["state"] == "done"
    assert by_kind["prompts"]["numbers"][2]["key"] == "prompts_reverse"
    assert all(value is not None for value in by_kind["prompts"]["numbers"][2]["values"].values())
    assert not [trial for trial in result.store.trials(controls=True) if trial.state.name == "FAIL"]
    code, output, error = call("audit", copied)  # the study's own section: nothing is done twice
    assert code == 0 and "diverged" in output and "training diverged: its loss is not finite" in output, error
    page = (copied / "report" / "report.html").read_text()
    assert "diverged" in page


def test_a_study_audits_its_finalists_by_itself(copied):
    spec = StudyResult.open(copied).spec.model_copy(update={"audit": Audit(top=1, tests=("quantisation",))})
    result = search.run_study(spec, copied, quiet=True)
    found, _ = audits_of(copied)
    assert len(found) == 3 * 3  # three grids; a finalist, the initial and the retain model
    assert result.store.record.seconds["audits"] > 0
    sentence = [text for text in conclusions(result) if "audited trial" in text]
    worst = max(
        number["values"][name]
        for audit in result.audits["audits"]
        for number in audit["numbers"]
        if number["key"] == "recovered"
        for name in number["values"]
        if number["values"][name] is not None
    )
    assert len(sentence) == 1 and f"undid {max(worst, 0):.0%}" in sentence[0]


def test_the_front_and_what_is_made_of_it_are_as_they_were(audited, finished):
    result, _ = audited
    plain = StudyResult.open(finished.out)
    assert list(result.front["trial"]) == list(plain.front["trial"])
    assert result.hypervolume == plain.hypervolume
    assert result.forget_quality_cap == plain.forget_quality_cap


def test_what_measures_no_objective_has_no_values_and_is_in_no_front_of_optunas(audited):
    from optuna_dashboard._pareto_front import get_pareto_front_trials

    result, _ = audited
    controls = result.store.controls
    by_kind = {}
    for trial in controls.get_trials():
        by_kind.setdefault(trial.user_attrs["kind"], []).append(trial)
    for kind in ("membership", "fluency"):
        assert {trial.state.name for trial in by_kind[kind]} == {"PRUNED"} and all(not trial.values for trial in by_kind[kind])
    assert {trial.state.name for trial in by_kind["nf4"]} == {"COMPLETE"}
    shown = [*controls.best_trials, *get_pareto_front_trials(controls.get_trials(), controls.directions)]
    assert shown and not {trial.user_attrs["kind"] for trial in shown} & {"membership", "fluency"}
    # Old folders have such audits with the values of their model: they are read alike.
    rows = result.controls[result.controls["kind"] == "membership"]
    assert len(rows) == 3 and rows["min_k_auc"].notna().all()


def test_the_doctor_finds_nothing_wrong_with_a_study_that_was_audited(audited, call):
    code, output, error = call("doctor", audited[0].out)
    assert code == 0 and "no problem found" in output, error
    assert "have none" not in output


def test_the_robust_rule_takes_the_strongest_after_the_worst_attack(audited, call):
    result, best = audited
    attacked = after_attacks(result)
    forgetting = result.objectives[0].name
    rows = result.controls[result.controls["kind"].isin(AUDITS["quantisation"]) & (result.controls["of_trial"] == best)]
    assert attacked["worst"].tolist() == [rows[forgetting].min()]
    code, output, error = call("select", result.out, "--rule", "robust", "--floor", "0.01", "--json")
    assert code == 0, error
    chosen = json.loads(output)
    assert chosen["trial"] == best and f"{attacked['worst'][0]:z.2f} after the attack, " in chosen["reason"]


def test_the_robust_rule_says_where_more_attacks_were_tried_on_some(new_store, made_up_evidence):
    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    for epoch, forgetting, utility, kinds in ((1, -2.0, 0.7, ("int8", "nf4")), (2, -1.0, 0.65, ("int8",))):
        point = {"base": "npo", "epoch": epoch, "alpha": 0.0}
        number, job = store.ask_point(store.spec.search_space(), point, "alpha_zero")
        store.complete(job, number, made_up_evidence(job, forgetting, utility))
        for kind in kinds:
            audit = TrialSpec(kind, **point, of_trial=number)
            store.complete(audit, store.ask_control(audit), made_up_evidence(audit, forgetting, utility))
            note = StudyResult.of(store).choose("robust", 0.5)[1]
            if kind == "nf4":
                assert note is None
    assert "they were held against 1 to 2 attacks, and more find more; uipe audit " in note


def test_without_an_audit_the_robust_rule_says_what_to_run(finished, call):
    code, _, error = call("select", finished.out, "--rule", "robust")
    assert code == 2 and "uipe audit" in error


def test_the_report_and_the_command_show_them(audited, call):
    result, best = audited
    code, output, error = call("audit", result.out, "--trial", best, "--tests", "quantisation,membership")
    assert code == 0, error
    assert (
        "weights in 4 bits (NF4)" in output and "AUC of Min-K%" in output and "not tested" in output and "-0.00" not in output
    )
    row = after_attacks(result).iloc[0]
    title = CONTROLS[row["attack"]].audit.title
    before = f"trial {best}: log10 forget quality {result.trial(best)['log10_forget_quality']:z.2f}, "
    assert f"{before}{row['worst']:z.2f} after the worst of 3 attacks on its weights ({title})" in output
    page = (result.out / "report" / "report.html").read_text()
    assert '<section id="audits">' in page and "weights in 4 bits (NF4)" in page and "not tested" in page
    front = page[page.index('<section id="front-table">') : page.index('<section id="alpha">')]
    assert "AUC of Min-K% of forget against holdout items" in front


def test_the_front_has_columns_of_audits_where_there_were_any(audited, finished, capsys):
    result, best = audited
    columns = {each["key"]: each for each in result.audits["front"]}
    assert list(columns) == ["audit_worst", "audit_min_k_auc"]
    forgetting = result.objectives[0]
    assert columns["audit_worst"]["texts"][str(best)] == f"{result.after_attacks[best]:.{forgetting.places}f}"
    capsys.readouterr()
    print_front(result, 200)
    wide = capsys.readouterr().out
    print_front(StudyResult.open(finished.out), 200)
    without = capsys.readouterr().out
    assert "attack" in wide and "Min-K%" in wide and columns["audit_worst"]["texts"]["initial"] in wide
    assert "attack" not in without and "not tested" not in without


def test_a_front_point_that_was_not_audited_says_so_and_narrow_terminals_leave_audits_out(new_store, made_up_evidence, capsys):
    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    numbers = []
    for epoch, forgetting, utility in ((1, -5.0, 0.7), (2, -2.0, 0.6)):
        point = {"base": "npo", "epoch": epoch, "alpha": 0.0}
        number, job = store.ask_point(store.spec.search_space(), point, "alpha_zero")
        store.complete(job, number, made_up_evidence(job, forgetting, utility))
        numbers.append(number)
    audit = TrialSpec("membership", "npo", 1, 0.0, of_trial=numbers[0])
    store.prune(audit, store.ask_control(audit), {**store.identity(audit), "min_k_auc": 0.75})
    result = StudyResult.of(store)
    (column,) = result.audits["front"]
    texts = dict(zip(map(str, numbers), ("0.750", "not tested"), strict=True))
    assert column["texts"] == {**texts, "initial": "not tested", "retain": "no retain model"}
    print_front(result, 200)
    wide = capsys.readouterr().out
    assert wide.count("not tested") == 2 and "0.750" in wide
    print_front(result, 70)
    narrow = capsys.readouterr().out
    assert "left out, because the terminal is narrow: AUC Min-K%" in " ".join(narrow.split()) and "0.750" not in narrow


def test_the_dashboards_note_has_them_too(audited):
    from optuna_dashboard import get_note

    from search.dashboard.annotate import annotate

    result, best = audited
    annotate(result)
    row = next(line for line in get_note(result.study).splitlines() if line.startswith(f"| {best} |"))
    texts = [each["texts"][str(best)] for each in result.audits["front"]]
    assert row.endswith(f"| {' | '.join(texts)} |")
    assert "audits of finalists" in get_note(result.store.controls)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tests", "quantization"), "'quantization' is none of quantisation"),
        (("--tests", " , "), "names none; give some of quantisation"),
        (("--top", "0"), "--top: 0"),
        (("--trial", "999"), "is not a complete trial"),
        (("--trial", "0", "--rule", "knee"), "one of them"),
    ],
)
def test_what_cannot_be_audited_is_refused(finished, call, options, said):
    code, _, error = call("audit", finished.out, *options)
    assert code == 2 and said in error


def one_point(new_store, made_up_evidence):
    """A store with the initial model and one point that forgot: the store, the point, and its trial's number."""
    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    point = {"base": "npo", "epoch": 1, "alpha": 0.0}
    number, job = store.ask_point(store.spec.search_space(), point, "alpha_zero")
    store.complete(job, number, made_up_evidence(job, -2.0, 0.7))
    return store, point, number


def test_an_audit_that_cannot_be_done_says_why_and_the_study_goes_on(new_store, made_up_evidence):
    store, point, number = one_point(new_store, made_up_evidence)
    audit = TrialSpec("relearn_few", **point, of_trial=number)
    evidence = {**store.identity(audit), UNTESTED: "training diverged: its loss is not finite"}
    store.prune(audit, store.ask_control(audit), evidence)
    result = StudyResult.of(store)
    facts = next(each for each in result.audits["audits"] if each["kind"] == "relearn_few")
    assert facts["state"] == "not tested"
    assert facts["reasons"] == {str(number): "training diverged: its loss is not finite"}
    assert facts["rows"][0]["texts"] == {"initial": "not tested", "retain": "no retain model", str(number): "diverged"}
    assert result.after_attacks == {}
    with pytest.raises(UserError, match="uipe audit"):
        result.select("robust")


def test_an_attack_that_ruins_the_model_brought_nothing_back(new_store, made_up_evidence):
    store, point, number = one_point(new_store, made_up_evidence)
    for kind, forgetting, ruined in (("nf4", -3.0, None), ("relearn_few", -8.0, "20 nats per token on retain")):
        audit = TrialSpec(kind, **point, of_trial=number)
        store.complete(audit, store.ask_control(audit), {**made_up_evidence(audit, forgetting, 0.1), "collapsed": ruined})
    result = StudyResult.of(store)
    relearned = next(each for each in result.audits["audits"] if each["kind"] == "relearn_few")
    assert {row["texts"][str(number)] for row in relearned["rows"]} == {"collapsed"}
    assert relearned["reasons"] == {str(number): "collapsed under it: 20 nats per token on retain"}
    assert result.after_attacks == {number: -3.0}


def test_a_study_from_before_there_was_a_holdout_is_audited_with_one(copied):
    record = json.loads((copied / "study.json").read_text())
    for part in (record["corpus"]["sets"], record["corpus"]["groups"], *record["corpus"]["items"].values()):
        del part["holdout"]
    (copied / "study.json").write_text(json.dumps(record))
    best = int(StudyResult.open(copied).front["trial"].iloc[0])
    result = search.audit_study(copied, [best], tests=("membership",), quiet=True)
    auc = audit_table(result).set_index("key").loc["min_k_auc"]
    assert auc["initial"] > 0.9 and 0 <= auc[best] <= 1


def test_membership_without_holdout_items_says_what_it_lacks(new_store, made_up_evidence):
    store = new_store(corpus={"kind": "people", "forget_people": 200, "retain_people": 100, "pretraining_people": 60})
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": 0.0}, "alpha_zero")
    store.complete(job, number, made_up_evidence(job, -2.0, 0.7))
    result = StudyResult.of(store)
    with pytest.raises(UserError, match="membership: needs holdout items, and the corpus has none"):
        result.audit_jobs([number], None, ("membership",))
    assert {job.kind for job in result.audit_jobs([number], None, ("membership", "fluency"))} == {"fluency"}


def test_privleak_is_against_the_retain_models_auc_where_there_is_one(audited, new_store, made_up_evidence):
    result, best = audited
    table = audit_table(result)
    aucs, leaks = (table[(table["kind"] == "membership") & (table["key"] == key)].iloc[0] for key in ("min_k_auc", "privleak"))
    assert leaks["number"] == "PrivLeak against the retain model's AUC, %"
    assert leaks["retain"] == 0.0
    for name in ("initial", best):
        assert leaks[name] == pytest.approx(100 * ((1 - aucs[name]) / (1 - aucs["retain"]) - 1))
    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": 0.0}, "alpha_zero")
    store.complete(job, number, made_up_evidence(job, -2.0, 0.7))
    audit = TrialSpec("membership", model="initial")
    store.prune(audit, store.ask_control(audit), {**store.identity(audit), "min_k_auc": 0.9})
    table = audit_table(StudyResult.of(store))
    alone = table[table["key"] == "privleak"].iloc[0]
    assert alone["number"] == "PrivLeak against 0.5, %" and alone["initial"] == pytest.approx(-80.0)


def test_the_initial_model_knows_its_members_and_the_retain_model_does_not(audited):
    table = audit_table(audited[0])
    auc = table[(table["kind"] == "membership") & (table["key"] == "min_k_auc")].iloc[0]
    assert auc["initial"] > 0.9 and abs(auc["retain"] - 0.5) < 0.4


def evidence_of_samples(store, audit, recall):
    numbers = {"sampling_rouge": recall, "sampling_contained": 0.0}
    return {**store.identity(audit), **numbers}


def test_numbers_are_known_with_their_settings_only(new_store, made_up_evidence):
    store, _, number = one_point(new_store, made_up_evidence)

    def jobs(samples):
        store.spec = store.spec.model_copy(update={"audit": Audit(samples=samples)})
        return StudyResult.of(store).audit_jobs([number], None, ("sampling",))

    def shown():
        facts = StudyResult.of(store).audits
        row = next(each for each in facts["audits"] if each["kind"] == "sampling")["rows"][0]
        return row["title"], row["texts"][str(number)], row["texts"]["initial"]

    few, many = jobs(3)[0], jobs(20)[0]
    assert few != many and json.loads(many.settings) == {"samples": 20}
    store.prune(few, store.ask_control(few), evidence_of_samples(store, few, 0.25))
    # Nothing has the study's own settings yet: what is there is shown, and says with which.
    assert shown() == ("highest ROUGE-L recall of 3 samples", "0.250", "not tested")
    assert few in _done_jobs(store) and many not in _done_jobs(store)
    store.prune(many, store.ask_control(many), evidence_of_samples(store, many, 0.75))
    assert shown() == ("highest ROUGE-L recall of 20 samples", "0.750", "not tested")
    failed = replace(many, of_trial=None, base=None, epoch=None, alpha=None, model="initial")
    store.prune(failed, store.ask_control(failed), {**store.identity(failed), UNTESTED: "no texts"})
    assert shown()[2] == "not possible"
    assert jobs(3)[0] in _done_jobs(store)
    # What could not be done with other settings was not tried with these.
    assert shown()[2] == "not tested"
    assert shown()[:2] == ("highest ROUGE-L recall of 3 samples", "0.250")


def test_samples_of_a_study_that_kept_only_their_number_are_shown(new_store, made_up_evidence):
    store = new_store()
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": 0.0}, "alpha_zero")
    store.complete(job, number, made_up_evidence(job, -2.0, 0.7))
    audit = TrialSpec("sampling", model="initial")
    evidence = {**evidence_of_samples(store, audit, 0.5), "samples": 7.0}
    store.prune(audit, store.ask_control(audit), evidence)
    row = next(each for each in StudyResult.of(store).audits["audits"] if each["kind"] == "sampling")["rows"][0]
    assert (row["title"], row["texts"]["initial"]) == ("highest ROUGE-L recall of 7 samples", "0.500")


def test_a_dossier_says_what_was_done_and_what_was_not(audited, call, tmp_path):
    result, best = audited
    code, output, error = call("dossier", result.out, "--trial", best, "--to", tmp_path / "dossier.html")
    assert code == 0, error
    assert output.split() == [str(tmp_path / "dossier.html"), str(tmp_path / "dossier.json")]
    facts, page = json.loads((tmp_path / "dossier.json").read_text()), (tmp_path / "dossier.html").read_text()
    assert facts["claim"].count("certifies nothing") == 1 and facts["claim"] in page
    assert facts["request"]["sets"]["forget"]["items_scored"] == 8 and "forget_texts" not in facts["request"]
    assert facts["procedure"]["alpha"] == result.trial(best)["alpha"]
    tested = {audit["title"] for audit in facts["audits"]}
    missing = {each["title"]: each["reason"] for each in facts["not_tested"]}
    assert "weights in 4 bits (NF4)" in tested and missing["relearned: a few items"] == "not asked for"
    assert "membership" in tested and missing["samples"] == "not asked for"
    assert tested | set(missing) == {control.audit.title for control in CONTROLS.values() if control.audit is not None}
    number = next(each for each in facts["numbers"] if each["name"] == result.objectives[0].name)
    assert (
        number["trial"] == result.trial(best)[number["name"]] and number["initial"] == result.control("initial")[number["name"]]
    )
    for text in (*missing, *tested):
        assert text.replace(">", "&gt;") in page
    assert "<built-in" not in page


def test_a_dossier_has_texts_only_where_they_are_asked_for(audited, call, tmp_path, preparation):
    result, best = audited
    item = preparation.corpus.sets["forget"][0]
    assert call("dossier", result.out, "--trial", best, "--to", tmp_path / "without.html")[0] == 0
    assert call("dossier", result.out, "--trial", best, "--to", tmp_path / "with.html", "--texts")[0] == 0
    facts = json.loads((tmp_path / "with.json").read_text())
    assert [item.question, item.answer] in facts["request"]["forget_texts"]
    assert item.answer in (tmp_path / "with.html").read_text()
    assert item.answer not in (tmp_path / "without.html").read_text()


def test_texts_of_a_dossier_run_a_models_code_only_where_that_is_allowed(
    finished, preparation, new_store, made_up_evidence, call, tmp_path
):
    folder = str(preparation.models.store.find(preparation.models.key("full", preparation.models.config)))
    store = new_store(model={"kind": "pretrained", "initial": folder, "retain": folder, "trust_remote_code": True})
    initial = TrialSpec("initial", model="initial")
    store.complete(initial, store.ask_control(initial), made_up_evidence(initial, -9.0, 0.8))
    number, job = store.ask_point(store.spec.search_space(), {"base": "npo", "epoch": 1, "alpha": 0.0}, "alpha_zero")
    store.complete(job, number, made_up_evidence(job, -2.0, 0.7))
    out = store.out
    store.close()
    command = ("dossier", out, "--trial", number, "--to", tmp_path / "dossier.html", "--texts")
    code, _, error = call(*command)
    assert code == 2 and "--trust-remote-code" in error
    code, _, error = call(*command, "--trust-remote-code")
    assert code == 0, error
    assert json.loads((tmp_path / "dossier.json").read_text())["request"]["forget_texts"]


@pytest.mark.parametrize("options", [(), ("--trial", "0", "--rule", "knee"), ("--trial", "999")])
def test_a_dossier_of_no_trial_is_refused(finished, call, tmp_path, options):
    code, *_ = call("dossier", finished.out, *options, "--to", tmp_path / "d.html")
    assert code == 2 and not (tmp_path / "d.html").exists()
