"""What --preflight makes of its verdicts, and its options. Nothing is started."""

import time

import pytest

from launcher import __main__ as command
from launcher import restart
from launcher.__main__ import main
from launcher.failure.kinds import HOST
from launcher.job.options import parser
from launcher.preflight import judge, report, start
from launcher.preflight.collectives import TRANSPORTS
from launcher.restart import Lost
from launcher.supervise import Outcome
from tests.launcher.job.test_restart import job_on
from tests.launcher.preflight.test_preflight_verdicts import document


def checked(document, tmp_path, monkeypatch, *options, outcome=None):
    """Returns (exit code, job) of a job on hosts a, b and c whose preflight found this."""
    job, own = job_on("a:2\nb:2\nc:2\n", "--preflight", *options, tmp_path=tmp_path)
    monkeypatch.setattr(start, "_run_checks", lambda job, options: (outcome or Outcome(0), document))
    return start.run(job, own)


def lame():
    made = document()
    for name, host in zip("abc", made["hosts"]):
        host["name"] = name
    made["hosts"][1]["disk_bytes"] = 0
    return judge.complete(made)


def test_a_host_that_cannot_be_used_ends_the_job_or_is_left_out(tmp_path, monkeypatch, capsys):
    code, job = checked(lame(), tmp_path, monkeypatch)
    assert code == HOST and [host.name for host in job.plan.hosts] == ["a", "b", "c"]
    code, job = checked(lame(), tmp_path, monkeypatch, "--restarts", "1", "--min-ranks", "2")
    assert code == 0 and [host.name for host in job.plan.hosts] == ["a", "c"] and len(job.plan.ranks) == 4
    assert "starting with 4 ranks, without b" in capsys.readouterr().err
    with pytest.raises(ValueError, match="what remains takes 4 ranks, the job needs 6"):
        checked(lame(), tmp_path, monkeypatch, "--restarts", "1")


def test_it_stays_out_in_later_starts(tmp_path, monkeypatch):
    job, own = job_on("a:2\nb:2\nc:2\n", "--preflight", "--restarts", "1", "--min-ranks", "2", tmp_path=tmp_path)
    monkeypatch.setattr(start, "_run_checks", lambda job, options: (Outcome(0), lame()))
    _, job = start.run(job, own)
    again = restart._again(job, own, Lost(hosts=("c",)), 4, 1)
    assert [host.name for host in again.plan.hosts] == ["a"]


def test_a_job_of_checks_that_fails_or_is_stopped_ends_the_job(tmp_path, monkeypatch, capsys):
    code, _ = checked(None, tmp_path, monkeypatch, outcome=Outcome(71))
    assert code == 71 and "out of memory (exit code 71)" in capsys.readouterr().err
    stopped = Outcome(143, asked_to_stop=True)
    assert checked(judge.complete(document()), tmp_path, monkeypatch, outcome=stopped)[0] == 143


def test_a_full_disk_keeps_no_program_from_starting(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "write", lambda document, path: (_ for _ in ()).throw(OSError(28, "No space left")))
    file = str(tmp_path / "figures")
    assert checked(judge.complete(document()), tmp_path, monkeypatch, "--preflight-file", file)[0] == 0
    assert f"the preflight's file {file} cannot be written: No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--preflight", "--preflight-over", "udp"], "--preflight-over: invalid choice: 'udp'"),
        (["--preflight-file", "/dev/null/x"], "the preflight's file /dev/null/x cannot be written: "),
        (["--preflight-file", "/dev"], "the preflight's file /dev cannot be written: it is a folder"),
        (["--preflight", "--preflight-limit", "0"], "--preflight-limit must be more than 0 seconds, got 0"),
        (["--preflight-over", "gloo"], "--preflight-over is for checks before the program; it needs --preflight"),
        (["--preflight-limit", "3"], "--preflight-limit is for checks before the program; it needs --preflight"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, sentence, capsys):
    assert main(["-n", "2", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_the_time_until_ranks_are_to_save_counts_from_the_start_of_the_checks(tmp_path, monkeypatch):
    """A batch script's --save-after is what the scheduler's limit leaves."""
    job, own = job_on("a:2\n", "--preflight", "--save-after", "100", tmp_path=tmp_path)
    monkeypatch.setattr(start, "run", lambda job, options: (time.sleep(0.5), job))
    command.check_first(job, own)
    assert 90 < own.save_after <= 99.5


def test_a_choice_of_transport_is_a_row_of_the_table():
    (action,) = [action for action in parser()._actions if action.dest == "preflight_over"]
    assert [*action.choices] == ["auto", *TRANSPORTS, "none"]
