"""Comparisons over tasks: statistics by hand, and the script on small evaluations."""

import numpy as np
import pytest
import scipy.stats

import compare
from figures import report

OURS = "pretrained/adam4rl (trained)"


def test_the_probability_of_being_better_counts_pairs():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0])
    assert compare.better(x, y) == pytest.approx((4 + 0.5) / 6)  # 1>0, 2>0, 3>2, 3>0; 2 = 2
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=20), rng.normal(size=30)
    u = scipy.stats.mannwhitneyu(x, y).statistic
    assert compare.better(x, y) == pytest.approx(u / 600)


def test_the_probability_of_improvement_is_the_mean_over_tasks():
    always, never = np.array([2.0, 3.0]), np.array([0.0, 1.0])
    assert compare.probability_of_improvement([(always, never)] * 2) == (1.0, 1.0, 1.0)
    middle, low, high = compare.probability_of_improvement([(always, never), (never, always)])
    assert middle == low == high == 0.5
    rng = np.random.default_rng(1)
    same = [(rng.normal(size=10), rng.normal(size=10)) for _ in range(5)]
    middle, low, high = compare.probability_of_improvement(same)
    assert low < middle < high and high - low > 0.1
    # Mann-Whitney's U has the standard deviation sqrt(m n (m + n + 1) / 12).
    x, y = rng.normal(size=(2, 100))
    _, low, high = compare.probability_of_improvement([(x, y)])
    assert (high - low) / 2 == pytest.approx(1.645 * (201 / 120_000) ** 0.5, rel=0.12)


def write_evaluation(folder, finals):
    """finals: (environment, optimizer, learning rate) -> the final return of each of 4 seeds. A
    curve goes from 0 to it in a straight line."""
    folder.mkdir()
    results = [
        report.Result(*key, np.arange(1, 6), np.outer(final, np.linspace(0, 1, 5)), np.arange(4))
        for key, final in finals.items()
    ]
    report.write_results(folder / "results.csv", results)


@pytest.fixture
def evaluation(tmp_path):
    spread = np.array([0.97, 0.99, 1.01, 1.03])
    finals = {}
    for env_name, ours, adam in (("ant", 20, 10), ("hopper", 10, 10), ("humanoid", 5, 10)):
        finals |= {(env_name, OURS, 1.0): ours * spread}
        finals |= {(env_name, "adam", 0.1): adam * spread, (env_name, "adam", 0.2): 0.1 * spread}
    write_evaluation(tmp_path / "run", finals)
    return tmp_path


def test_the_script_says_where_it_is_above_level_and_below(evaluation, call):
    _, out, _ = call(compare.main, "run", "--out", "out")
    for kind in ("final", "mean"):
        wanted = "above on 1: ant; level on 1: hopper; below on 1: humanoid"
        assert f"{kind} return, against the best classical optimizer of each task: {wanted}" in out
    table = (evaluation / "out" / "table.md").read_text()
    # The last two evaluations of a line from 0 are at 3/4 and 1; the mean is a half.
    assert f"| **{OURS}** | 1 | 17.5 (" in table and "| adam | 0.1 | 8.75 (" in table
    assert "| 0.2 |" not in table and "10 (" in table
    rates = "| task | adam |\n|---|---|\n| ant | 0.1 |\n| hopper | 0.1 |\n| humanoid | 0.1 |"
    assert table.rstrip().endswith(f"### Learning rates\n\n{rates}")
    call(compare.main, "out", "--out", "again")  # from scores.csv
    assert (evaluation / "again" / "table.md").read_text() == table
    assert "held out" not in table
    call(compare.main, "run", "--held-out", "humanoid", "--out", "held_out")
    table = (evaluation / "held_out" / "table.md").read_text()
    said = "- final return, against the best classical optimizer of each task held out:"
    assert f"{said} above on 0; level on 0; below on 1: humanoid\n" in table
    assert "| humanoid* |" in table and "| ant |" in table


def test_an_optimizer_of_few_tasks_is_not_in_the_figure(evaluation):
    """Adam is better on none of two and level on one: 1 on ant, 1/2 on hopper, 0 on humanoid. Then
    each task has another one: what is left is empty, and not an error."""
    by_env = compare.read((str(evaluation / "run"),))

    def drawn():
        figure, axis = compare.plt.subplots()
        compare.draw_probabilities(axis, by_env, OURS)
        compare.plt.close(figure)
        names = [text.get_text() for text in axis.get_yticklabels()] if axis.lines else []
        return names, [line.get_xdata() for line in axis.lines]

    names, (final, mean, _) = drawn()  # the last line is at 1/2
    assert names == ["adam (3)"] and final[0] == mean[0] == pytest.approx(0.5)
    by_env["humanoid"] = [*by_env["ant"]]
    assert drawn()[1][0][0] == pytest.approx(2.5 / 3)
    for name, other in (("hopper", "rmsprop"), ("humanoid", "sgd")):
        ours, adam = sorted(by_env[name], key=lambda s: s.label != OURS)
        by_env[name] = [ours, adam._replace(label=other)]
    assert drawn() == ([], [])
    compare.draw(evaluation / "compare.png", by_env, OURS)
    assert (evaluation / "compare.png").read_bytes()[1:4] == b"PNG"


def test_profiles_are_the_share_of_seeds_above_each_return(evaluation):
    """Ours are 2, 1 and a half of Adam's."""
    by_env = compare.read((str(evaluation / "run"),))
    figure, axis = compare.plt.subplots()
    compare.draw_profiles(axis, by_env, OURS)
    compare.plt.close(figure)
    (line,) = [line for line in axis.lines if line.get_label() == "adam4rl"]
    np.testing.assert_allclose(np.interp([0.25, 0.75, 1.25], *line.get_data()), [1, 2 / 3, 1 / 3])


def test_the_hardest_to_beat_is_at_the_top(evaluation):
    by_env = compare.read((str(evaluation / "run"),))
    for scores in by_env.values():
        adam = next(s for s in scores if s.label == "adam")
        scores.append(adam._replace(label="rmsprop", final=adam.final + 100, mean=adam.mean + 100))
    figure, axis = compare.plt.subplots()
    compare.draw_probabilities(axis, by_env, OURS)
    compare.plt.close(figure)
    names = [text.get_text() for text in axis.get_yticklabels()]  # from the bottom
    assert names == ["adam (3)", "rmsprop (3)"]


def test_normalised_returns_are_0_at_the_first_and_1_at_the_best_classical(evaluation):
    scores = compare.read((str(evaluation / "run"),))["ant"]
    found = compare.normalised(scores, "final")
    np.testing.assert_allclose([found["adam"].mean(), found[OURS].mean()], [1, 2], rtol=1e-3)
    lower = [
        s._replace(first=s.first - 10, final=np.array([-10.0, 0.0, s.final.mean(), 0.0]))
        for s in scores
    ]
    found = compare.normalised(lower, "final")  # 0 at -10; Adam's mean is (8.75 - 10) / 4
    assert found[OURS][0] == 0 and found["adam"][1] == pytest.approx(10 / (10 - 0.3125), rel=1e-2)


def test_seeds_are_paired_by_their_number_whatever_their_order():
    finals, seeds = np.array([1.0, 2.0, 3.0, 4.0]), np.arange(4.0)
    adam = compare.Scores("ant", "adam", 1.0, seeds, finals, finals, finals)
    others = (seeds[::-1], finals[::-1] + 0.1)
    ours = compare.Scores("ant", OURS, 1.0, others[0], finals, others[1], others[1])
    assert compare.verdict([ours, adam], OURS, "final") == "above"
    shuffled = ours._replace(seeds=seeds)  # as if they were in Adam's order
    assert compare.verdict([shuffled, adam], OURS, "final") == "level"


@pytest.mark.parametrize(
    "args, said",
    [
        ((), "at least one folder"),
        (("run", "--of", "x"), "ant: needs x; has"),
        (("run", "--held-out", "catch"), "--held-out catch: not compared; there are ant, hopper"),
    ],
)
def test_bad_input_is_one_line(args, said, evaluation, call):
    code, _, err = call(compare.main, *args)
    assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["results.csv", "scores.csv"])
def test_a_file_of_zero_bytes_is_one_line(name, tmp_path, call):
    (tmp_path / "zeros").mkdir()
    (tmp_path / "zeros" / name).write_bytes(bytes(300_000))
    code, _, err = call(compare.main, "zeros")
    assert code == 2 and f"zeros/{name}: not " in err and err.count("\n") == 1


def test_an_out_that_cannot_be_written_is_one_line(evaluation, call):
    code, _, err = call(compare.main, "run", "--out", "/proc")
    assert code == 1 and "/proc/scores.csv" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (999.4, 3, "999"),
        (999.6, 3, "1000"),
        (999.6, 4, "999.6"),
        (-999.96, 4, "-1000"),
        (1e4, 3, "10000"),
    ],
)
def test_a_number_of_1000_or_more_is_whole_also_by_rounding(value, digits, text):
    assert compare.cell(np.full(4, value), digits, with_interval=False) == text


def test_the_summary_has_a_row_for_each_task(evaluation):
    untrained = {("ant", OURS.replace("(trained)", "(untrained)"), 1.0): 15 * np.ones(4)}
    write_evaluation(evaluation / "more", untrained | {("ant", "rmsprop", 0.1): 12 * np.ones(4)})
    folders = (str(evaluation / "run"), str(evaluation / "more"))
    head, _, ant, hopper, humanoid = compare.summary(compare.read(folders), OURS).splitlines()
    shown = ("`adam4rl`", "`adam4rl` untrained", "Adam", "best classical", "`adam4rl` is")
    assert head == f"| task | {' | '.join(shown)} |"
    # The last two evaluations of a line from 0 to x have the mean 7/8 x.
    assert [cell.split()[0] for cell in ant.split("|")[2:5]] == ["17.5", "13.1", "8.75"]
    assert ant.endswith("| 10.5 (10.5 to 10.5) `rmsprop` | above |")
    assert hopper.split("|")[3] == " - " and humanoid.startswith("| humanoid | 4.38 (")


def test_a_lost_seed_is_below_all_and_its_optimizer_is_not_the_best_classical(tmp_path):
    lost = np.array([90.0, np.nan, 90.0, 90.0])
    finals = {("ant", OURS, 1.0): 20 * np.ones(4), ("ant", "adam", 0.1): 10 * np.ones(4)}
    write_evaluation(tmp_path / "run", finals | {("ant", "rmsprop", 0.1): lost})
    by_env = compare.read((str(tmp_path / "run"),))
    compare.write_scores(tmp_path / "scores.csv", [*by_env["ant"]])
    assert "ant,rmsprop,0.1,1,nan,-inf,-inf\n" in (tmp_path / "scores.csv").read_text().replace(
        "\r", ""
    )
    for name, best in (("run", by_env), ("scores", compare.read((str(tmp_path),)))):
        table = compare.table(best, OURS)
        assert "8.75 (8.75 to 8.75) `adam` |" in table.split("###")[0], name
        assert "| rmsprop | 0.1 | 78.75 (78.75 to 78.75), 1 lost |" in table
    ours, _, theirs = (s.final for s in by_env["ant"])
    assert compare.better(ours, theirs) == 0.25
    assert compare.verdicts(by_env, "rmsprop")[0].endswith("below on 1: ant")


def test_of_two_that_lose_seeds_the_one_that_loses_fewer_is_above():
    def verdict(ours, theirs):
        nothing = np.zeros(4)
        pair = [
            compare.Scores("ant", label, 1.0, np.arange(4), nothing, np.array(x), nothing)
            for label, x in ((OURS, ours), ("adam", theirs))
        ]
        return compare.verdict(pair, OURS, "final")

    lost = -np.inf
    assert verdict([100, 101, 102, lost], [1, 2, 3, lost]) == "above"  # of three pairs
    assert verdict([1, 2, 3, lost], [1, 2.5, 2.5, lost]) == "level"
    assert verdict([1, 2, 3, lost], [100, 101, lost, lost]) == "above"
    assert verdict([100, 101, lost, lost], [lost, 1, 2, 3]) == "below"
    assert verdict([100, 101, lost, lost], [lost, lost, 2, 3]) == "level"  # no pair is left


def test_if_all_lose_seeds_the_best_is_the_one_that_loses_fewest_whatever_the_order():
    lost, nothing = -np.inf, np.zeros(3)
    few, many = np.array([0.8, lost, 0.9]), np.array([0.1, lost, lost])
    by_label = [("rmsprop", many), ("adam", few), (OURS, np.array([0.5, 0.6, lost]))]
    for order in (by_label, by_label[::-1]):
        scores = [
            compare.Scores("ant", label, 1.0, np.arange(3), nothing, x, x) for label, x in order
        ]
        assert compare.best_classical(scores, "final").label == "adam"
        found = compare.normalised(scores, "final")
        np.testing.assert_allclose(found["adam"], few / 0.85)
        np.testing.assert_allclose(found[OURS], np.array([0.5, 0.6, lost]) / 0.85)


def test_of_two_learning_rates_that_lose_seeds_the_one_that_loses_fewer_is_read(tmp_path):
    one, two = np.array([9.0, np.nan, np.nan, 9.0]), np.array([1.0, np.nan, 1.0, 1.0])
    for name, finals in (("a", (one, two)), ("b", (two, one))):
        rates = {("ant", "adam", 0.1 * (i + 1)): final for i, final in enumerate(finals)}
        write_evaluation(tmp_path / name, rates)
        (scores,) = compare.read((str(tmp_path / name),))["ant"]
        assert np.nanmax(scores.final) < 1.0, name


def test_of_two_learning_rates_one_that_loses_no_seed_is_taken():
    steps, seeds = np.array([1.0, 2.0]), np.arange(2)
    good = report.Result("ant", "adam", 0.1, steps, np.array([[0.0, 1.0], [0.0, 1.0]]), seeds)
    lost = good._replace(learning_rate=1.0, returns=np.array([[0.0, 9.0], [0.0, np.nan]]))
    assert report.at_best_rate([lost, good]) == report.at_best_rate([good, lost]) == [good]
    assert "| adam (1 seeds ended early, not finite) | 1 | 4.500 | one seed |" in report.table(
        [lost]
    )


def test_seeds_of_several_evaluations_are_merged_and_refused_twice(tmp_path):
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 3.0, 5.0])
    for name, values, first in (("a", one, 0), ("b", other, 10), ("c", other, 3)):
        result = report.Result("ant", "adam", 0.1, np.arange(1, 3), np.outer(values, [0, 1]), None)
        (tmp_path / name).mkdir()
        result = result._replace(seeds=first + np.arange(4))
        report.write_results(tmp_path / name / "results.csv", [result])
        compare.write_scores(tmp_path / f"{name}.csv", compare.read_all((str(tmp_path / name),)))
    for names in (("a", "b"), ("a.csv", "b"), ("b.csv", "a.csv")):
        (scores,) = compare.read_all(tuple(str(tmp_path / name) for name in names))
        assert sorted(scores.seeds) == [0, 1, 2, 3, 10, 11, 12, 13]
        assert scores.final.mean() == pytest.approx((one.mean() + other.mean()) / 4)
    with pytest.raises(ValueError, match="adam at 0.1 on ant: seed 3 is there twice"):
        compare.read_all((str(tmp_path / "a.csv"), str(tmp_path / "c.csv")))


def test_large_seeds_keep_their_digits(tmp_path):
    seeds = 1_000_001 + np.arange(3)
    nothing = np.zeros(3)
    scores = compare.Scores("ant", "adam", 0.1, seeds, nothing, np.arange(3.0), nothing)
    compare.write_scores(tmp_path / "scores.csv", [scores])
    (again,) = compare.read_all((str(tmp_path),))
    assert again.seeds.tolist() == [1_000_001, 1_000_002, 1_000_003]


def test_a_task_where_no_classical_optimizer_learns_is_not_in_the_profiles():
    def scores(label, final):
        first, seeds = np.full(4, 0.5), np.arange(4)
        return compare.Scores("ant", label, 0.1, seeds, first, np.full(4, final), first)

    assert compare.normalised([scores("adam", 0.4), scores(OURS, 0.3)], "final") == {}
    assert compare.normalised([scores("adam", -np.inf), scores(OURS, 0.7)], "final") == {}
    found = compare.normalised([scores("adam", 0.6), scores(OURS, 0.7)], "final")
    np.testing.assert_allclose(found[OURS], 2)
    np.testing.assert_allclose(found["adam"], 1)
    none = {"hopper": [scores("adam", 0.4), scores(OURS, 0.3)]}
    one = {"ant": [scores("adam", 0.6), scores(OURS, 0.7)]}
    figure, axes = compare.plt.subplots(1, 2)
    compare.draw_profiles(axes[0], one | none, OURS)
    compare.draw_profiles(axes[1], one, OURS)
    compare.plt.close(figure)
    assert axes[0].get_title() == "optimizers that are on 1 of 2 tasks"
    assert axes[1].get_title() == "optimizers that are on all tasks"
    for line, same in zip(axes[0].lines, axes[1].lines, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), same.get_ydata())
    assert len(axes[0].lines) == 2


def test_without_two_seeds_in_common_there_is_no_verdict(tmp_path):
    write_evaluation(tmp_path / "run", {("ant", OURS, 1.0): np.ones(4)})
    result = report.Result("ant", "adam", 0.1, np.arange(1, 3), np.ones((2, 2)), np.array([3, 4]))
    (tmp_path / "other").mkdir()
    report.write_results(tmp_path / "other" / "results.csv", [result])
    scores = compare.read((str(tmp_path / "run"), str(tmp_path / "other")))["ant"]
    assert compare.missing(scores, OURS) == f"two seeds that {OURS} and adam both have"
