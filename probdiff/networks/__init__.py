"""Networks that predict, and heads that make noise of what they predict."""
