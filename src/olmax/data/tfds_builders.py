"""TFDS datasets of what a user must fetch: the OLMo 2 mixes, from files downloaded by hand.

Importing this imports tensorflow-datasets (a second) and makes the datasets known to it:

    hf download allenai/dolmino-mix-1124 --repo-type dataset --include "data/wiki/*" \\
        --local-dir MANUAL_DIR/dolmino-mix-1124

    builder = tfds.builder("dolmino_mix_1124/wiki", file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=MANUAL_DIR)
    builder.download_and_prepare(download_config=config)
    prepare([document_source(builder)], ...)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, cast

import tensorflow_datasets as tfds
from etils import epath

from olmax.data import mixtures, sources
from olmax.data.documents import Document, DocumentSource
from olmax.errors import UserError

VERSION = "1.0.0"


def config_name(source: str) -> str:
    """Name of the builder configuration of a source: TFDS allows no hyphens."""
    return source.replace("-", "_")


class _HubMix(tfds.core.GeneratorBasedBuilder):
    """Documents of one source of a mix; a subclass names the repository on the Hugging Face hub."""

    VERSION = tfds.core.Version(VERSION)
    REPOSITORY: str
    DESCRIPTION: str

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=self.DESCRIPTION,
            homepage=f"https://huggingface.co/datasets/{self.REPOSITORY}",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "id": tfds.features.Text(),
                    "source": tfds.features.Text(),
                }
            ),
            # Training shuffles packed instances; shuffling terabytes of text before gains nothing.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        assert self.builder_config is not None  # there is no unnamed configuration
        source = self.builder_config.description  # the folder's own name, hyphens and all
        folder = (
            epath.Path(dl_manager.manual_dir) / self.REPOSITORY.split("/")[-1] / "data" / source
        )
        if not folder.is_dir():
            raise UserError(f"{folder}: not there; {_instructions(self.REPOSITORY)}")
        return {"train": self._generate_examples(folder, source)}

    def _generate_examples(
        self, folder: epath.Path, source: str
    ) -> Iterator[tuple[int, dict[str, str]]]:
        key = 0
        for path in sources.expand([folder]):
            for document in sources.read_file(path, source=source):
                yield key, {"text": document.text, "id": document.id, "source": source}
                key += 1


def _instructions(repository: str) -> str:
    folder = repository.split("/")[-1]
    return (
        f"download the folders you want of https://huggingface.co/datasets/{repository} into "
        f"<manual_dir>/{folder}, for example with `hf download {repository} "
        f"--repo-type dataset --include 'data/wiki/*' --local-dir <manual_dir>/{folder}`"
    )


def _configs(mix: mixtures.Mix) -> list[tfds.core.BuilderConfig]:
    return [
        tfds.core.BuilderConfig(name=config_name(source.name), description=source.name)
        for source in mix.sources
    ]


class OlmoMix1124(_HubMix):
    """OLMo-Mix-1124, the pretraining mix of OLMo 2 (3.9T tokens), one configuration a source."""

    name = "olmo_mix_1124"
    REPOSITORY = "allenai/olmo-mix-1124"
    DESCRIPTION = "Pretraining mix of OLMo 2 (paper, table 4). Licence: ODC-BY."
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(REPOSITORY)
    BUILDER_CONFIGS = _configs(mixtures.OLMO_MIX_1124)


class DolminoMix1124(_HubMix):
    """Dolmino-Mix-1124, the mid-training sources of OLMo 2, one configuration for each source."""

    name = "dolmino_mix_1124"
    REPOSITORY = "allenai/dolmino-mix-1124"
    DESCRIPTION = "Mid-training sources of OLMo 2 (paper, table 5). Licence: ODC-BY."
    MANUAL_DOWNLOAD_INSTRUCTIONS = _instructions(REPOSITORY)
    BUILDER_CONFIGS = _configs(mixtures.DOLMINO_50B)


def document_source(
    builder: tfds.core.DatasetBuilder,
    *,
    split: str = "train",
    name: str | None = None,
    text_key: str = "text",
) -> DocumentSource:
    """Documents of a TFDS dataset.

    Args:
        builder: already downloaded and prepared, in any file format. (seqio Tasks read TFDS's
            default format only.)
        split: its split.
        name: of the source; the builder's configuration (or its name) when None.
        text_key: feature that holds the text.
    """
    label = name or (builder.builder_config.name if builder.builder_config else builder.name)

    def read() -> Iterator[Document]:
        # The decorators of these methods hide their arguments from type checkers.
        opened = cast(Any, builder)
        if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
            examples = opened.as_data_source(split=split)
        else:
            examples = tfds.as_numpy(opened.as_dataset(split=split, shuffle_files=False))
        for index, example in enumerate(examples):
            text = example[text_key]
            yield Document(
                text=text.decode("utf-8") if isinstance(text, bytes) else str(text),
                id=f"{builder.info.full_name}/{split}/{index}",
                source=label,
            )

    info: Any = builder.info.splits[split]
    described = f"{builder.info.full_name}/{split}/{info.num_examples}/{info.num_bytes}/{text_key}"
    return DocumentSource(
        name=label, fingerprint=hashlib.sha256(described.encode()).hexdigest()[:16], read=read
    )
