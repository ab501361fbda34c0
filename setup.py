__import__("setuptools").setup()  # everything is in pyproject.toml
