use rule teacher as coefficients with:
    input:
        inputs("coefficients"),
    output:
        "results/{study}/coefficients/coefficients.npz",
        "results/{study}/coefficients/card.json",
    log:
        "logs/{study}/coefficients.log",
    benchmark:
        "logs/{study}/coefficients.tsv"
    params:
        verb=verb("coefficients"),
