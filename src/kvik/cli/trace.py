"""`kvik trace`: one text through the cache, step by step."""
