"""`kvik bench`: what a cache saves and costs, measured here."""
