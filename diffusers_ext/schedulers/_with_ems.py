"""Schedulers that carry empirical model statistics: load them, save them beside the config, find them again."""

from __future__ import annotations

from pathlib import Path

from ._ems import EMS, log_snr_span


EMS_FILE = "ems.safetensors"


class StatisticsMixin:
    """For a `NoiseLevelScheduler` with an option `ems_file` and an attribute `ems`, None at first."""

    def load_ems(self, ems: EMS | str | Path):
        """Use these statistics, an `EMS` or a file of `EMS.save`, from the next `set_timesteps` on.

        Returns:
            The scheduler itself.

        Raises:
            ValueError: They were computed for another noise schedule.
        """
        ems = ems if isinstance(ems, EMS) else EMS.load(ems)
        check_span(ems, self.noise_schedule)
        self.ems = ems
        self.register_to_config(ems_file=EMS_FILE)
        return self

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save the config and, if there are any, the statistics as `ems.safetensors` beside it."""
        if self.ems is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.ems.save(Path(save_directory) / EMS_FILE)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, subfolder=None, return_unused_kwargs=False, **kwargs):
        """Load the config and the statistics saved beside it.

        Raises:
            FileNotFoundError: The config names statistics, but the file is not there.
        """
        scheduler, unused = super().from_pretrained(pretrained_model_name_or_path, subfolder, True, **kwargs)
        if scheduler.config.ems_file is not None:
            scheduler.load_ems(_locate(cls.__name__, pretrained_model_name_or_path, subfolder, kwargs))
        return (scheduler, unused) if return_unused_kwargs else scheduler


def check_span(ems: EMS, schedule) -> None:
    """Raise `ValueError` unless the statistics were computed for these noise levels."""
    low, high = log_snr_span(schedule)
    start, end = ems.log_snr[0].item(), ems.log_snr[-1].item()
    cell = (end - start) / (len(ems.log_snr) - 1)
    if abs(start - low) > cell or abs(end - high) > cell:
        raise ValueError(
            f"the statistics cover log-SNR {start:.3f} to {end:.3f}, the model's noise levels {low:.3f} to "
            f"{high:.3f}: compute statistics for this model and noise schedule"
        )


def _locate(name: str, source, subfolder: str | None, options: dict) -> Path:
    folder = Path(source, subfolder or "")
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        passed = {k: v for k, v in options.items() if k in ("cache_dir", "revision", "token", "local_files_only")}
        return Path(hf_hub_download(str(source), EMS_FILE, subfolder=subfolder, **passed))
    if not (folder / EMS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {EMS_FILE}, which its scheduler_config.json names: load the scheduler by itself with "
            f"{name}.from_pretrained(repo, subfolder='scheduler'), or set ems_file to null"
        )
    return folder / EMS_FILE
