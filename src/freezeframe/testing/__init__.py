"""For tests, ours and other people's: tiny guests that need no Linux. Nothing in the product imports this."""
