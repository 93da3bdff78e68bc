use rule report as track with:
    input:
        "results/{study}/report/report.html",
        "results/{study}/report/summary.json",
    output:
        "results/{study}/track/tracked.json",
    log:
        "logs/{study}/track.log",
    benchmark:
        "logs/{study}/track.tsv"
    params:
        verb="track",
