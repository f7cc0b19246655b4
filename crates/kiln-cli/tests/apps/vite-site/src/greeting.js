export const greeting = (path) => `you are at ${path}`;
