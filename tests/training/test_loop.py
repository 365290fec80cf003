"""A training run that is stopped and resumed is the run that was never stopped."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from training.loop import LONGEST, Loss, Plan, Trainer, averaged  # noqa: E402


def trainer(path: Path, steps: int = 12, seed: int = 4) -> Trainer:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    return Trainer(network, Plan(rate=1e-2, steps=steps, warmup=3, seed=seed), path)


def loss_of(one: Trainer) -> Loss:
    def loss(step: int, progress: float, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(5, 3, generator=generator)
        return (one.module(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole.pt")
    whole.run(loss_of(whole))
    first = trainer(tmp_path / "parts.pt")
    first.run(loss_of(first), until=5)
    second = trainer(tmp_path / "parts.pt")
    second.load()
    assert second.step == 5
    second.run(loss_of(second))
    assert second.step == whole.step == 12
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name])
    for name, value in averaged(tmp_path / "whole.pt").items():
        assert torch.equal(value, averaged(tmp_path / "parts.pt")[name])


def test_training_lowers_the_loss_and_another_seed_takes_another_way(tmp_path: Path) -> None:
    one, other = trainer(tmp_path / "a.pt", 200), trainer(tmp_path / "b.pt", 200, seed=5)
    before = loss_of(one)(0, 0.0, torch.Generator().manual_seed(1)).item()
    one.run(loss_of(one))
    other.run(loss_of(other))
    assert loss_of(one)(0, 0.0, torch.Generator().manual_seed(1)).item() < before / 4
    assert not torch.equal(one.module[0].weight, other.module[0].weight)


def test_rate_warms_up_and_ends_near_zero() -> None:
    plan = Plan(rate=1.0, steps=100, warmup=10)
    rates = [plan.rate_at(step, plan.progress(step, 0.0)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], abs=0.02)
    assert rates[100] == pytest.approx(0.01)


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path / "a.pt", steps=6)
    times = iter([0.0, 1.0, 2.0, 5000.0, 5001.0, 5002.0, 5003.0])
    monkeypatch.setattr("training.loop.time.monotonic", lambda: next(times))
    one.run(loss_of(one))
    assert one.seconds == 5 + LONGEST
