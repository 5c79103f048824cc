"""Small models that kvik trains itself: `kvik train`."""
