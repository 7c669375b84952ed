"""The paper's tables and figures, trained, measured and set beside the paper's numbers.

``scales`` says how much of everything, ``networks`` what is trained, ``lab`` keeps what is done; each experiment is a
module with ``measure(lab)``, which gives results for JSON, and ``show(results, folder)``, which makes its page and
pictures from them; ``claims`` compares the results with what the paper says.
"""
