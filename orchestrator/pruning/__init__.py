"""The passes of a run: layer by layer, in one pass, refined, and the perplexity of what they wrote."""
