//! Short connections between proxies of pods that are easily mistaken for each other. `cargo xtask soak --accelerate
//! --connections 1000000` makes more of them.

use tests::joined::churn::churn;

#[test]
fn no_connection_is_joined_with_another() {
    const CONNECTIONS: u64 = 5000;
    let churned = churn(CONNECTIONS, 1).expect("none crossed, none stuck");
    println!("{churned:?}");
    assert_eq!(churned.made + churned.broken, CONNECTIONS);
    assert!(churned.broken * 100 <= churned.made, "{churned:?}");
}
