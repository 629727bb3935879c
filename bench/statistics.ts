export { deviation, mean, median } from '../src/report/statistics.js';
