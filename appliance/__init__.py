"""An appliance that trains small private assistants and serves them on hardware already in the building."""

__version__ = "0.1.0"
