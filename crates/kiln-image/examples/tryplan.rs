//! scratch
use std::path::Path;
use kiln_image::{bases::Bases, context::{Tree, Limits, pack}, plan::{Options, plan, render}};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let bases = Bases::load(Path::new("/nonexistent"), Path::new(&a[1])).unwrap();
    let p = match plan(Path::new(&a[2]), &Options::default(), &bases) {
        Ok(p) => p,
        Err(e) => { println!("error: {e}\n  hint: {}\n  source: {:?}", e.hint().unwrap_or_default(), std::error::Error::source(&e).map(|s| s.to_string())); std::process::exit(e.class().exit_code().into()) }
    };
    println!("{}", render(&p));
    if let Some(out) = a.get(3) {
        std::fs::write(format!("{out}/Dockerfile"), &p.dockerfile).unwrap();
        let ex: Vec<&str> = p.extra_ignores.iter().map(String::as_str).collect();
        let t = Tree::open(&Path::new(&a[2]).join(&p.root), p.dockerfile_path.as_deref(), &ex, Limits::default()).unwrap();
        let mut f = std::fs::File::create(format!("{out}/ctx.tar")).unwrap();
        println!("{:?}", pack(&t, &mut f).unwrap());
    }
}
