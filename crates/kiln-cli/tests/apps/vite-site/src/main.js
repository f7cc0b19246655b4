import "./style.css";
import { greeting } from "./greeting.js";

document.querySelector("#app").textContent = greeting(location.pathname);
