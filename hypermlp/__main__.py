"""``python -m hypermlp``: the command ``hypermlp``, of the package that is installed beside this one."""

from importlib import import_module

if __name__ == "__main__":
    import_module("hypermlp_lab.cli").main()
