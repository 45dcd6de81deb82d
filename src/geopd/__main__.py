"""``python -m geopd``, which launchers such as ``accelerate launch -m geopd`` need."""

from geopd.cli import main

if __name__ == "__main__":
    main()
