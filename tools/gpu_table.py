"""The table that `gpu_check.py` prints."""


def table(results):
    about = results["environment"]
    lines = [f"{about['device']}, driver {about.get('driver', '-')}, torch {about['torch']}"]
    for name, found in results["steps"].items():
        lines.append(f"{name:14s} {found['status']:8s} {found.get('seconds', 0):6.1f} s  {found.get('reason', '')}")
        for row in found.get("rows", []):
            if "median_ms" in row and "batch" in row:
                mode = row.get("options", {}).get("mode", row.get("backend", ""))
                ci = row["ci95"]
                lines.append(
                    f"    {row['network']:30s} {mode:10s} {row['precision']} b{row['batch']:<3d} {row['median_ms']:8.3f} ms "
                    f"[{ci[0]:.3f}, {ci[1]:.3f}] {row['status']}"
                )
            elif "median_error" in row:
                errors = f"median error {100 * row['median_error']:.1f} %, p90 {100 * row['p90_error']:.1f} %"
                lines.append(f"    {row['network']:30s} model: {errors}, Spearman {row['spearman']:.4f}")
            elif "edges" in row:
                lines.append(f"    {row['network']:30s} {row['group']}: right edges {list(row['edges'])}")
    return "\n".join(lines)
