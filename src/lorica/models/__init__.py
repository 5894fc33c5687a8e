"""Base models, adapters, the Lightning modules that train them, and optimisers."""
