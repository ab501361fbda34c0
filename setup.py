"""Metadata is in pyproject.toml; here are the list of packages and reproducible distributions."""

import gzip
import os
import tarfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

EPOCH = "SOURCE_DATE_EPOCH"


class ReproducibleSdist(sdist):
    """With the variable SOURCE_DATE_EPOCH: one time stamp, sorted names, nobody's files, usual rights."""

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """The file written; see setuptools."""
        if format != "gztar" or EPOCH not in os.environ:
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        stamp = int(os.environ[EPOCH])

        def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = stamp, 0, 0, "", ""
            entry.mode = 0o755 if entry.isdir() else 0o644
            return entry

        file = Path(f"{base_name}.tar.gz")
        with (
            open(file, "wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=stamp) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)  # goes through folders in the order of their names
        return str(file)


class ReproducibleWheel(bdist_wheel):
    """With the same variable: usual rights. Everything else setuptools does by itself."""

    def write_wheelfile(self, *arguments, **options):
        """The last step before the files are packed; see setuptools."""
        super().write_wheelfile(*arguments, **options)
        if EPOCH in os.environ:
            for file in filter(Path.is_file, Path(self.bdist_dir).rglob("*")):
                file.chmod(0o644)


setup(
    # the folder trainers/, which nnUNet_extTrainer is given, is a package of another name (package-dir)
    packages=[*find_packages(include=["nnunet_cfcl", "nnunet_cfcl.*"]), "nnunet_cfcl._dropin"],
    cmdclass={"bdist_wheel": ReproducibleWheel, "sdist": ReproducibleSdist},
)
