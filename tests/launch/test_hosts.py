"""Many hosts: two network namespaces, SLURM's script, torchrun, and reasons why processes cannot join."""

import contextlib
import dataclasses
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser

from gen_dist.config import TrainConfig
from gen_dist.errors import ConfigError
from gen_dist.parallel.processes import start_processes
from gen_dist.records.checkpoint import checkpoint_paths
from gen_dist.records.metrics_file import read_metrics
from gen_dist.training.run import train
from tests.conftest import REPOSITORY
from tests.launch.network_hosts import Host, two_hosts
from tests.support.runs import close_losses, losses_of, small_config, write_config
from tests.support.two_ranks import free_port

TRAIN = str(REPOSITORY / "launch/train.py")
TOOLS = sysconfig.get_path("scripts")
CONFIGS = REPOSITORY / "launch/configs"


def _config(**changes: object) -> TrainConfig:
    return small_config("vae", steps=20, **changes)


def _start(command: Sequence[object], **environment: str) -> "subprocess.Popen[str]":
    kept = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=kept | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _outputs(processes: list["subprocess.Popen[str]"], timeout: float = 240) -> list[str]:
    """Output of each process. All of them have ended when this returns."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # launchers end what they started
                process.communicate(timeout=60)


def _assert_equals_one_process(run: Path, alone: Path) -> None:
    train(_config(run_dir=str(alone)), say=lambda _line: None)
    one, many = (read_metrics(path / "metrics.jsonl") for path in (alone, run))
    assert [record["step"] for record in many] == list(range(1, 21))
    assert losses_of(many) == close_losses(losses_of(one))
    assert json.loads((run / "checkpoints/step_00000020/state.json").read_text())["world_size"] == 2


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them."""
    with two_hosts() as both:
        yield both


def _launch_on(hosts: tuple[Host, Host], words: list[object], **environment: str) -> list["subprocess.Popen[str]"]:
    options = ["--config_file", CONFIGS / "hosts_cpu.yaml", "--main_process_ip", hosts[0].address]
    launch = [Path(TOOLS) / "accelerate", "launch", *options]
    return [
        _start([*host.enter, *launch, "--machine_rank", rank, TRAIN, *words], **environment)
        for rank, host in enumerate(hosts)
    ]


def test_two_hosts_equal_one_process(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", write_config(tmp_path / "config.json", _config()), "--run-dir", run]
    processes = _launch_on(hosts, words)
    outputs = _outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "finished at step 20" in outputs[0] and "finished" not in outputs[1]
    _assert_equals_one_process(run, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a cut cable", "a stopped process"])
def test_a_run_of_two_hosts_goes_on_after(fault: str, hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """Nobody says anything any more, so the processes wait for each other until the time is up."""
    run, config = tmp_path / "run", _long_config()
    words = ["--config", write_config(tmp_path / "config.json", config), "--run-dir", run]
    processes = _launch_on(hosts, words, GEN_DIST_STEP_SECONDS="25")
    _wait_for_checkpoint(run, processes)
    if fault == "a cut cable":
        hosts[1].set_cable(plugged=False)
        outputs = _outputs(processes)
        hosts[1].set_cable(plugged=True)
    else:
        (stopped,) = _workers(hosts[1].process_ids(), rank=1)
        stopped.send_signal(signal.SIGSTOP)
        outputs = _outputs(processes[:1])
        stopped.send_signal(signal.SIGCONT)
        outputs += _outputs(processes[1:])
    _assert_ended_in_a_line(processes, outputs)
    again = _launch_on(hosts, words)
    outputs = _outputs(again)
    assert [process.returncode for process in again] == [0, 0], outputs
    _assert_went_on(run, config, outputs[0], tmp_path / "alone")


@pytest.mark.slow
def test_a_run_with_shared_weights_goes_on_after_a_stopped_process(tmp_path: Path) -> None:
    run, config = tmp_path / "run", _long_config()
    words = ["--config", write_config(tmp_path / "config.json", config), "--run-dir", run]
    launch = [Path(TOOLS) / "accelerate", "launch", "--config_file", CONFIGS / "cpu_2_processes.yaml", TRAIN, *words]
    processes = [_start(launch, GEN_DIST_STEP_SECONDS="25")]
    _wait_for_checkpoint(run, processes)
    (stopped,) = _workers([one.pid for one in psutil.Process(processes[0].pid).children(recursive=True)], rank=1)
    stopped.send_signal(signal.SIGSTOP)
    (output,) = outputs = _outputs(processes)  # the launcher kills the process that does not end
    _assert_ended_in_a_line(processes, outputs)
    # In a sum of logs gloo's own limit ends the wait, and it knows no names.
    named = rf"\(rank 1 \(process {stopped.pid}\) of this run did not arrive in \d+ s\)"
    assert re.search(rf"{named}|cannot be reached \(Timed out waiting 25000ms", output)
    again = [_start(launch)]
    (output,) = _outputs(again)
    assert again[0].returncode == 0, output
    _assert_went_on(run, config, output, tmp_path / "alone")


def _long_config() -> TrainConfig:
    """Long enough for a fault between two checkpoints."""
    return small_config("vae", steps=1200, checkpoint_every=40, evaluate_every=1200, sample_every=1200)


def _wait_for_checkpoint(run: Path, processes: list["subprocess.Popen[str]"]) -> None:
    deadline = time.monotonic() + 120
    while len(checkpoint_paths(run)) < 2:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended and time.monotonic() < deadline, [process.communicate()[0] for process in ended]
        time.sleep(0.05)


def _workers(process_ids: Sequence[int], rank: int) -> list[psutil.Process]:
    """Processes of this rank that train."""
    found = []
    for number in process_ids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(number)
            if process.environ().get("RANK") == str(rank) and TRAIN in process.cmdline()[:3]:
                found.append(process)
    return found


def _assert_ended_in_a_line(processes: list["subprocess.Popen[str]"], outputs: list[str]) -> None:
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode != 0
        lines = _errors(output)
        assert lines, output
        for line in lines:
            assert "another process of this run has ended or cannot be reached (" in line
            assert line.endswith("; see its output, then run the same command")


def _assert_went_on(run: Path, config: TrainConfig, output: str, alone: Path) -> None:
    assert re.search(r"resuming .* at step \d+ of 1200", output), output
    train(dataclasses.replace(config, run_dir=str(alone)), say=lambda _line: None)
    one, many = (read_metrics(path / "metrics.jsonl") for path in (alone, run))
    assert [record["step"] for record in many] == list(range(1, 1201))
    assert losses_of(many)[:50] == close_losses(losses_of(one)[:50])
    assert losses_of(many)[-1] == pytest.approx(losses_of(one)[-1], rel=1e-2)


@pytest.mark.parametrize("name", ["hosts_cpu", "hosts_8_gpus"])
@pytest.mark.parametrize("forgotten", ["--machine_rank", "--main_process_ip"])
def test_a_forgotten_option_of_a_host_is_an_error_at_once(name: str, forgotten: str) -> None:
    given = {"--machine_rank": "1", "--main_process_ip": "127.0.0.1"}
    del given[forgotten]
    words = [word for option in given.items() for word in option]
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), *words, TRAIN, "vae-mnist"])
    with pytest.raises(ValueError, match=f"give {forgotten}"):
        launch_command(arguments)


@pytest.mark.slow
def test_hosts_that_join_but_cannot_connect_say_so(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    processes = _launch_on(
        hosts, ["vae-mnist", "--run-dir", tmp_path], GLOO_SOCKET_IFNAME="lo", GEN_DIST_JOIN_SECONDS="8"
    )
    printed = [line for output in _outputs(processes) for line in _errors(output)]
    assert len(printed) == 2
    for line in printed:
        assert re.search(
            rf"error: the processes reached {hosts[0].address}:29500 but cannot connect .* now lo$", line
        ), line


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"(rank \d+: )?error: ", line)]


@pytest.mark.slow
def test_torchrun_trains_one_run_of_two_processes(tmp_path: Path) -> None:
    words = ["--config", write_config(tmp_path / "config.json", _config()), "--run-dir", tmp_path / "run"]
    processes = [_start([Path(TOOLS) / "torchrun", "--nproc-per-node", 2, TRAIN, *words])]
    outputs = _outputs(processes)
    assert processes[0].returncode == 0, outputs
    _assert_equals_one_process(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", ["", "1"], ids=["of CPUs", "of a GPU each"])
def test_the_slurm_script_trains_one_run_on_two_nodes(gpus: str, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands: both nodes are this machine. Without GPUs, their processes use its CPUs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        "#!/bin/bash\n[[ $* == 'show hostnames node[1-2]' ]] && printf '%s\\n' localhost node2\n"
    )
    (tools / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    variables = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_ON_NODE": "2"}
    if gpus:
        variables["SLURM_GPUS_ON_NODE"] = gpus
    words = ["--config", write_config(tmp_path / "config.json", _config()), "--run-dir", tmp_path / "run"]
    script = _start(
        [REPOSITORY / "launch/slurm.sh", *words, "--device", "cpu"],
        PATH=os.pathsep.join([str(tools), TOOLS, os.environ["PATH"]]),
        **variables,
    )
    output = _outputs([script])
    assert script.returncode == 0, output
    _assert_equals_one_process(tmp_path / "run", tmp_path / "alone")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Function that starts this process as one of two launched ones, and returns its error."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    def error_of(rank: int, address: str, port: int, **environment: str) -> str:
        given = {"RANK": str(rank), "MASTER_ADDR": address, "MASTER_PORT": str(port), "GEN_DIST_JOIN_SECONDS": "1"}
        for name, value in {"WORLD_SIZE": "2", **given, **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError) as caught:
            start_processes(_config(device="cpu"))
        return str(caught.value)

    yield error_of
    os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A foreign server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("seconds", ["0", "soon", "-5", "1.5", "9" * 30])
@pytest.mark.parametrize("name", ["GEN_DIST_JOIN_SECONDS", "GEN_DIST_STEP_SECONDS"])
def test_times_that_are_none_are_refused_at_once(name: str, seconds: str, launched: Callable[..., str]) -> None:
    line = f"{name} is {seconds!r}; it takes whole seconds from 1 to 31,536,000, as "
    assert launched(0, "127.0.0.1", free_port(), **{name: seconds}).startswith(line)


def test_a_port_that_is_taken_is_named(launched: Callable[..., str], listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert launched(0, "127.0.0.1", port) == (
        f"port {port} is taken by another process of this host; choose another for all processes, with "
        "--main_process_port, torchrun's --master-port or MASTER_PORT"
    )


def test_a_foreign_server_is_named_though_it_never_answers(
    launched: Callable[..., str], listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    assert launched(1, "127.0.0.1", port).startswith(
        f"the program at 127.0.0.1:{port} is not the main process of a run (no answer); choose another"
    )


def test_a_main_host_that_cannot_be_reached_is_named(launched: Callable[..., str]) -> None:
    with socket.socket() as silent:  # nobody else can listen there
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        assert launched(1, "127.0.0.1", port) == (
            f"the main host cannot be reached at 127.0.0.1:{port}: Connection refused; check that address, that the "
            "main process runs, and the firewall"
        )
    assert launched(1, "nowhere.invalid", port).startswith(
        f"the main host cannot be reached at nowhere.invalid:{port}: "
    )


def test_processes_that_did_not_join_are_named(launched: Callable[..., str]) -> None:
    port = free_port()
    assert launched(0, "127.0.0.1", port, WORLD_SIZE="4") == (
        f"4 processes were launched but 1 joined at 127.0.0.1:{port} in time; absent: rank 1, 2, 3; see their "
        "output, and check that every host was given the same number of processes"
    )


def test_variables_that_a_launcher_sets_are_checked(launched: Callable[..., str]) -> None:
    assert launched(0, "", 1).startswith("MASTER_ADDR is not set; start processes with accelerate launch")
    assert launched(0, "127.0.0.1", 1, RANK="").startswith("RANK is '', not a whole number; start processes with")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match="this host was given 8 processes but has 2 GPUs"):
        start_processes(_config())


def test_a_user_sees_one_line_and_exit_code_2(
    launched: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = launched(1, "127.0.0.1", free_port())
    monkeypatch.setattr(sys, "argv", [TRAIN, "vae-mnist", "--run-dir", str(tmp_path), "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(TRAIN, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", f"rank 1: error: {line}\n")
