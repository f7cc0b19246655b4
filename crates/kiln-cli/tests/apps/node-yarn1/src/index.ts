import Koa from "koa";
import ms from "ms";
import { links } from "./links";

const started = Date.now();
const app = new Koa();

app.use(async (context) => {
  if (context.path === "/") {
    context.body = { name: "links", up: ms(Date.now() - started), user: process.getuid?.(), links: Object.keys(links) };
    return;
  }
  const target = links[context.path.slice(1)];
  if (target === undefined) {
    context.throw(404, "no such link");
  }
  context.redirect(target);
});

app.listen(Number(process.env.PORT ?? 3000));
