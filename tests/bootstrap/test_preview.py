"""What a run says before it begins: prompts as the model will read them, and disk that is close to what it takes."""

import pytest
from PIL import Image
from shared_run import make_samples, run

from bpo_fast.answers.given import GivenModel
from bpo_fast.bootstrap import bootstrap, preview
from bpo_fast.bootstrap.error_injected import ErrorInjected
from bpo_fast.bootstrap.image_weakened import ImageWeakened
from bpo_fast.models.prompt import question, render


def test_a_dry_run_shows_each_kinds_prompts_without_weights_and_writes_nothing(
    tiny_llava, tmp_path, capsys, monkeypatch
):
    records = make_samples(tmp_path)
    for part in tiny_llava:
        part.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(GivenModel, "load", lambda given: pytest.fail("loaded"))
    kinds = [ErrorInjected("count"), ImageWeakened(steps=(1, 2))]
    arguments = (tmp_path / "model", None, records, tmp_path / "images", tmp_path / "out")
    capsys.readouterr()
    assert bootstrap(*arguments, kinds=kinds, dry_run=True) is None
    shown = capsys.readouterr().out
    asked = render(tiny_llava[1], question("What is it?"))[0]
    assert shown.count(f"prompt:\n{asked}\n") == 4  # two samples, two steps
    assert shown.count("--- error_injected, record ") == 2
    assert records[0]["conversations"][1]["value"] in shown.partition("--- error_injected")[2]
    assert f"image: {tmp_path / 'images/0.png'} (4 x 4 pixels, 1 KiB)" in shown
    assert "disk: " in shown.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("embed_images", [False, True])
def test_the_disk_forecast_holds_what_the_run_takes_and_is_asked_before_it_writes(tmp_path, embed_images, monkeypatch):
    records = make_samples(tmp_path)
    for number in range(24):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / f"images/{number}.png")
    forecasts, forecast = [], preview.disk_forecast
    monkeypatch.setattr(preview, "disk_forecast", lambda job: forecasts.append(forecast(job)) or forecasts[-1])
    usage = preview.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preview.shutil, "disk_usage", lambda folder: usage._replace(free=2000))
        with pytest.raises(
            OSError, match=r"output_dir: found 2 KiB free on the disk of '.*out', expected \d+ KiB, whi"
        ):
            run(tmp_path, "out", records, embed_images=embed_images)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.notes").exists()
    run(tmp_path, "out", records, embed_images=embed_images, rows_per_part=24)
    taken = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert taken / 3 < forecasts[1] < 3 * taken
